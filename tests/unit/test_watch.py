"""The watches warn once, about what is new since their last check, and only if it is enough."""

from unittest.mock import patch

import pytest
import torch

from vllm_easyspec import watch
from vllm_easyspec.watch import LEAST_TESTED, ROUNDS, DraftWatch, PayoffWatch

SOUND = torch.ones(2, 8)


def warned(counts: list[list[int]], hidden: torch.Tensor = SOUND) -> tuple[list[tuple], list[str]]:
    """The warnings' arguments, and names, after checks of these counts and one more, after which the last is judged."""
    looks, names = DraftWatch(torch.device("cpu")), []
    with patch.object(watch.logger, "warning_once") as warning:
        for tested in [*counts, counts[-1]]:
            kept = torch.tensor([[0] * len(tested), tested])
            for _ in range(ROUNDS):
                names += looks.after_round(kept, hidden)
    return [call.args[1:] for call in warning.call_args_list], names


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[0, 1000, 0, 0]], [(0, 1000)]),
        ([[0, 990, 5, 5]], [(10, 1000)]),
        ([[0, 970, 20, 10]], []),
        ([[0, LEAST_TESTED - 1, 0, 0]], []),
        ([[0, 500, 500, 0], [0, 1500, 500, 0]], [(0, 1000)]),  # acceptance was good once
        ([[0, 900, 500, 0], [0, 300, 0, 0]], [(0, 300)]),  # counted from zero again in between
    ],
)
def test_low_acceptance(counts, expected):
    assert warned(counts) == (expected, ["low_acceptance"] * len(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_drafter_that_computes_no_numbers_is_not_called_a_bad_match(value):
    hidden = SOUND.clone()
    hidden[1, 3] = value
    assert warned([[0, 1000, 0, 0]], hidden) == ([()], ["not_finite"])


def payoff(drafts: int, accepted: int, **milliseconds: float) -> bool:
    """Whether a window of rounds that took this long is judged to cost time."""
    looks = PayoffWatch()
    looks.count_drafts(drafts, accepted)
    with patch.object(watch.logger, "warning_once") as warning:
        found = [looks.add([(name, ms / 1e3) for name, ms in milliseconds.items()]) for _ in range(ROUNDS)]
    assert not any(found[:-1])
    assert found[-1] is warning.called
    return found[-1]


@pytest.mark.parametrize(
    ("accepted", "draft", "costs_time"),
    [(2000, 10, False), (2000, 18, False), (2000, 21, True), (0, 0.1, True)],
)
def test_rounds_that_cost_more_than_they_bring(accepted, draft, costs_time):
    """With verification at 10 ms and calibration at 1 ms, 2 accepted of each draft pay for up to 30 ms a round."""
    assert payoff(1000, accepted, calibrate=1, draft=draft, verify=10) is costs_time


def test_few_drafts_are_not_judged():
    assert not payoff(LEAST_TESTED - 1, 0, calibrate=1, draft=100, verify=10)


def test_a_new_window_knows_nothing_of_the_last():
    looks = PayoffWatch()
    for accepted, costs_time in [(0, True), (5000, False)]:
        looks.count_drafts(1000, accepted)
        assert [looks.add([("draft", 0.02), ("verify", 0.01)]) for _ in range(ROUNDS)][-1] is costs_time
