"""The acceptance watch: it warns once, about counts since its last check, and only if there are enough."""

from unittest.mock import patch

import pytest
import torch

from vllm_easyspec import watch
from vllm_easyspec.watch import LEAST_TESTED, ROUNDS, AcceptanceWatch


def warned(counts: list[list[int]]) -> list[tuple]:
    """The warnings after checks of these counts; one more check, after which the last is judged."""
    looks = AcceptanceWatch(torch.device("cpu"))
    with patch.object(watch.logger, "warning_once") as warning:
        for tested in [*counts, counts[-1]]:
            kept = torch.tensor([[0] * len(tested), tested])
            for _ in range(ROUNDS):
                looks.after_round(kept)
    return [call.args[1:] for call in warning.call_args_list]


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
def test_warnings(counts, expected):
    assert warned(counts) == expected
