"""What the virtual batch requires of an attention backend, and cache blocks that it can't use."""

import copy
from types import SimpleNamespace

import pytest
import torch

from vllm_easyspec.drafter.paged_kv import PagedKV, Sequences

BLOCKS, BLOCK_SIZE = 4, 32


class Builder:
    """Like FlashAttention 3's: without `fast_build` it writes a schedule into its only buffer."""

    kernel_block_size = None

    def __init__(self):
        self.schedule = torch.zeros(8)

    def build_metadata(self, common, fast_build: bool = False):
        if fast_build:
            return SimpleNamespace(schedule=None, max_num_splits=32)
        self.schedule[: common.num_reqs] = common.num_reqs
        return SimpleNamespace(schedule=self.schedule[: common.num_reqs])


def sequences(reqs: int, queries: int = 1) -> Sequences:
    starts = torch.arange(reqs + 1, dtype=torch.int32) * queries
    lens = torch.full((reqs,), 5, dtype=torch.int32)
    return Sequences(
        positions=torch.full((reqs * queries,), 4),
        slots=torch.arange(reqs * queries) * BLOCK_SIZE + 4,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_bound=lens,
        block_table=torch.arange(reqs, dtype=torch.int32).unsqueeze(1),
        max_query_len=queries,
        max_seq_len=5,
    )


def test_metadata_for_groups_of_several_sizes_live_side_by_side():
    pages = PagedKV([], Builder(), BLOCKS, BLOCK_SIZE)
    single = pages.metadata(sequences(2).repeat_layers(1, BLOCKS, BLOCK_SIZE))
    before = copy.deepcopy(single.schedule)
    pages.metadata(sequences(2).repeat_layers(3, BLOCKS, BLOCK_SIZE))
    assert single.schedule is None or torch.equal(single.schedule, before)


@pytest.mark.parametrize(
    ("reqs", "queries", "splits"), [(8, 1, 32), (2, 4, 32), (3, 4, 0)], ids=["drafting", "captured", "longer"]
)
def test_splits_that_a_graph_needs_are_not_allowed_to_longer_passes(reqs, queries, splits):
    pages = PagedKV([], Builder(), BLOCKS, BLOCK_SIZE, captured_tokens=8)
    assert pages.metadata(sequences(reqs, queries)).max_num_splits == splits


@pytest.mark.parametrize(("pages", "kernel_block_size"), [(2 * BLOCKS, None), (BLOCKS, 16)])
def test_blocks_that_a_backend_splits_are_refused(pages, kernel_block_size):
    layer = SimpleNamespace(kv_cache=torch.zeros(pages, 2, BLOCK_SIZE, 8), layer_name="layers.0")
    group = SimpleNamespace(kernel_block_size=kernel_block_size)
    with pytest.raises(ValueError, match="splits the cache's blocks of 32 tokens into blocks of 16.*--block-size 16"):
        PagedKV([layer], group, BLOCKS, BLOCK_SIZE)
