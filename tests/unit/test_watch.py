"""The watch over acceptance: it warns once, of what was counted since its last look, and only where it can judge."""

from unittest.mock import patch

import pytest
import torch

from vllm_easyspec import watch
from vllm_easyspec.watch import LEAST_TESTED, ROUNDS, AcceptanceWatch


def warned(counts: list[list[int]]) -> list[tuple]:
    """The warnings of looks at these counts, one look each and one more, after which the last is judged."""
    looks = AcceptanceWatch(torch.device("cpu"))
    with patch.object(watch.logger, "warning_once") as warning:
        for tested in [*counts, counts[-1]]:
            stood = torch.tensor([[0] * len(tested), tested])
            for _ in range(ROUNDS):
                looks.after_round(stood)
    return [call.args[1:] for call in warning.call_args_list]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[0, 1000, 0, 0]], [(0, 1000)]),
        ([[0, 990, 5, 5]], [(10, 1000)]),
        ([[0, 970, 20, 10]], []),
        ([[0, LEAST_TESTED - 1, 0, 0]], []),
        ([[0, 500, 500, 0], [0, 1500, 500, 0]], [(0, 1000)]),  # it was well once
        ([[0, 900, 500, 0], [0, 300, 0, 0]], [(0, 300)]),  # counted from zero again in between
    ],
)
def test_warnings(counts, expected):
    assert warned(counts) == expected
