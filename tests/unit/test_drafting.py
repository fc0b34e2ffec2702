"""Which plan a round drafts with."""

import pytest
import torch

from vllm_easyspec.drafter.plan import LayerPlan
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.speculator import Drafting

PRECISE, HALVES, ONE = LayerPlan.precise(4), LayerPlan((2, 2)), LayerPlan((4,))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((), [PRECISE] * 6),
        (((2, HALVES, "block"), (4, ONE, "block")), [HALVES, HALVES, ONE, ONE, PRECISE, PRECISE]),
        (((1, HALVES, "block"), (None, ONE, "block")), [HALVES] + [ONE] * 5),
    ],
    ids=["none", "default above", "open"],
)
def test_choice(table, expected):
    drafting = Drafting(PRECISE, "attention", 5, "every_round", by_batch_size=table)
    chosen = [drafting.choice(num_reqs) for num_reqs in range(1, 7)]
    assert [plan for plan, _ in chosen] == expected
    assert all(scope == ("attention" if plan == PRECISE else "block") for plan, scope in chosen)


def test_rounds_are_counted_by_plan():
    statistics = DraftStatistics(torch.device("cpu"), 5)
    for drafts, plan in [(5, HALVES), (5, HALVES), (0, HALVES), (5, ONE)]:
        statistics.rounds_by_plan[drafts, plan, "block"] += 1
    rows = statistics.snapshot()["rounds_by_plan"]
    assert [(row["num_speculative_tokens"], row["group_sizes"], row["rounds"]) for row in rows] == [
        (5, [2, 2], 2), (0, [2, 2], 1), (5, [4], 1),
    ]  # fmt: skip
