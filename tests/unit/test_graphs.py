"""Which captured graph a round takes, and which graphs are captured. No CUDA: nothing is captured or replayed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_easyspec.batch import DraftBatch, DraftBounds
from vllm_easyspec.drafter.plan import DraftPlan, PlanTable
from vllm_easyspec.graphs import DraftGraph, DraftGraphs
from vllm_easyspec.settings import DraftSettings

K, SIZES, MAX_TOKENS = 3, [1, 4], 16
HALVES, ONE = DraftPlan((2, 2), "block"), DraftPlan((4,), "block")
SETTINGS = DraftSettings(PlanTable.of(ONE, [(1, HALVES)]), K)
BOUNDS = DraftBounds(max_drafts=K, max_len=100, graphs_test_room=False)


@pytest.fixture
def graphs() -> DraftGraphs:
    """With the graphs that it wants."""
    graphs = object.__new__(DraftGraphs)
    graphs.sizes, graphs.max_tokens = SIZES, MAX_TOKENS
    graphs.graphs = dict.fromkeys(graphs.wanted(SIZES, [K], SETTINGS))
    return graphs


def batch(reqs: int, query_len: int = K + 1, length: int = 50, **changes) -> DraftBatch:
    tensors = "idx_mapping input_ids query_starts start_positions num_valid sampled newest block_table"
    fields = dict.fromkeys(tensors.split(), torch.zeros(0))
    given = DraftBatch(
        num_reqs=reqs,
        num_drafts=K,
        query_lens=np.full(reqs, query_len),
        prefilling=np.zeros(reqs, dtype=bool),
        seq_lens_bound=np.full(reqs, length),
        dummy=False,
        **fields,
    )
    return replace(given, **changes)


def test_a_round_takes_the_graphs_of_its_size_and_plan(graphs):
    for reqs, size, plan in ((1, 1, HALVES), (2, 4, ONE), (4, 4, ONE)):
        assert graphs.for_calibration(batch(reqs), SETTINGS, BOUNDS) == DraftGraph.calibrate(size, K + 1)
        assert graphs.for_drafting(batch(reqs), SETTINGS, BOUNDS) == DraftGraph.draft(size, K, plan)


EAGER = {
    "more requests than the largest size": (batch(5), {}, True, True),
    "another number of tokens": (batch(2, query_len=2), {}, True, False),
    "uneven": (batch(2, query_lens=np.array([K + 1, 1])), {}, True, False),
    "a prompt": (batch(2, prefilling=np.array([False, True])), {}, True, False),
    "a K that was not captured": (batch(2, num_drafts=2), {}, False, True),
    "a plan that was not captured": (batch(2), {"plans": PlanTable.of(HALVES)}, False, True),
    "no calibration": (batch(2), {"calibration": "never"}, True, False),
    "a context about to fill up": (batch(2, length=100 - K - 1), {}, True, True),
    "a dummy run": (batch(2, dummy=True), {}, True, True),
}


@pytest.mark.parametrize(("given", "change", "calibrates", "drafts"), EAGER.values(), ids=EAGER.keys())
def test_other_rounds_are_eager(graphs, given, change, calibrates, drafts):
    settings = replace(SETTINGS, **change)
    assert (graphs.for_calibration(given, settings, BOUNDS) is None) == calibrates
    assert (graphs.for_drafting(given, settings, BOUNDS) is None) == drafts


def test_graphs_that_test_for_room_draft_where_a_context_fills_up(graphs):
    full, bounds = batch(2, length=99), replace(BOUNDS, graphs_test_room=True)
    assert graphs.for_calibration(full, SETTINGS, bounds) is None
    assert graphs.for_drafting(full, SETTINGS, bounds) == DraftGraph.draft(4, K, ONE)


def test_what_is_captured(graphs):
    """Each plan that a number of requests padded to a size takes; no calibration longer than vLLM's largest graph."""
    table = PlanTable.of(ONE, [(2, HALVES)])
    wanted = graphs.wanted([3, 9], [1, K, 4], replace(SETTINGS, plans=table, lookahead=True))
    assert wanted == [
        DraftGraph.calibrate(4, 2),
        DraftGraph.calibrate(4, K + 1),
        *(DraftGraph.draft(4, k, plan, lookahead=True) for k in (K, 4) for plan in (HALVES, ONE)),
    ]
    precise = DraftSettings(PlanTable.of(DraftPlan.precise(4)), K, lookahead=True)
    assert DraftGraph.draft(4, K, DraftPlan.precise(4)) in graphs.wanted([4], [K], precise), (
        "no maps for a single layer"
    )
