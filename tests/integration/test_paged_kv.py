"""The virtual batch on real pages: what a group's write changes, and that a group's call equals its layers' calls.

Two ranks, three layers of a drafter on each, with pages that vLLM laid out and its own attention backend.
"""

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drafter_cases import CASES, make_checkpoint

from vllm_easyspec.drafter.paged_kv import PagedKV, PagedPass, Sequences
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
CASE = CASES[0]
RANKS = 2
LAYERS = CASE.config.num_hidden_layers // RANKS  # on each rank
BLOCK_SIZE = 32
KV_NUMBERS = 2 * CASE.config.num_key_value_heads * CASE.config.head_dim  # that one token stores in one layer
CANARY = 777.0
GROUP = slice(1, 3)  # of a rank's layers: not the first, but the last

# Tokens in the pages and tokens read next, of each request: a decoding one, chunks across a block's end, a first chunk.
STATES = [
    ([90, 63, 3], [1, 1, 1]),
    ([31, 64, 0], [3, 1, 70]),
    ([0, 0, 0], [40, 1, 100]),
    ([127], [1]),
    ([100, 20], [5, 9]),
]


@dataclass
class Observed:
    """What one rank saw. Pages are `[layers, blocks, ...]`."""

    num_blocks: int
    slots: np.ndarray  # of the group's write, before any shift
    group_write: np.ndarray  # pages after it, canary elsewhere
    single_writes: np.ndarray  # the same by one write per layer and token
    pass_writes: np.ndarray  # pages after a fuzzy pass of the model with padding
    grouped: list[tuple[np.ndarray, np.ndarray]]  # for each of STATES: attention outputs, pages
    separate: list[tuple[np.ndarray, np.ndarray]]
    batches: list[tuple[Sequences, SimpleNamespace]]  # for each of STATES: before and after the repetition
    refusals: dict[str, str]
    current: tuple[bool, bool]  # before and after other pages were bound


def observe(folder: str) -> Observed:
    """On a rank."""
    # vLLM's CPU kernel splits long sequences over idle threads, differently in a group; here bits are compared.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    drafter = EnginelessDrafter(folder, max_num_reqs=3, max_len=128, block_size=BLOCK_SIZE)
    torch.manual_seed(drafter.model.rank)

    def rotate(layers, qkv, positions, cache=None, slots=None):
        """None: keys are stored as they are given."""
        assert cache is None, "CPU attention packs its keys"
        return _split(drafter, qkv)

    padded = _padded_sequences(drafter)
    qkv = _random_qkv(drafter, padded, LAYERS)
    _, k, v = _split(drafter, qkv)

    _fill(drafter, CANARY)
    PagedPass(drafter.pages, padded).attend(GROUP, qkv[: GROUP.stop - GROUP.start], rotate)
    group_write = _pages(drafter)
    _fill(drafter, CANARY)
    _write_one_by_one(drafter, padded, GROUP, k, v)
    single_writes = _pages(drafter)

    _fill(drafter, CANARY)
    drafter.run(torch.arange(len(padded.slots)) % 50, padded, DraftPlan((1, 4, 1)))
    pass_writes = _pages(drafter)

    grouped, separate, batches = [], [], []
    for lengths, new in STATES:
        drafter.rewind(lengths)
        sequences = drafter.sequences(new)
        virtual = sequences.repeat_layers(LAYERS, drafter.num_blocks, BLOCK_SIZE)
        metadata = drafter.pages.metadata(virtual)
        names = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
        built = {name: getattr(metadata, name) for name in names}
        batches.append((sequences, SimpleNamespace(slots=virtual.slots, positions=virtual.positions, **built)))
        qkv = _random_qkv(drafter, sequences, LAYERS)
        before = torch.randn(drafter.pages.pages(slice(0, LAYERS)).shape)
        for results, width in ((grouped, LAYERS), (separate, 1)):
            drafter.pages.pages(slice(0, LAYERS)).copy_(before)
            attention = PagedPass(drafter.pages, sequences)
            parts = enumerate(qkv.split(width))
            out = [attention.attend(slice(i * width, (i + 1) * width), part, rotate) for i, part in parts]
            results.append((torch.cat(out).numpy(), _pages(drafter)))
    current = drafter.pages.is_current()
    refusals = _refusals(drafter)
    return Observed(
        num_blocks=drafter.num_blocks,
        slots=padded.slots.numpy(),
        group_write=group_write,
        single_writes=single_writes,
        pass_writes=pass_writes,
        grouped=grouped,
        separate=separate,
        batches=batches,
        refusals=refusals,
        current=(current, drafter.pages.is_current()),
    )


def _padded_sequences(drafter: EnginelessDrafter) -> Sequences:
    """Rows with padding slots first, last, in between and as a whole request, beside slots at the ends of a layer.

    A layer's very last slot stays free: that is where a shifted -1 would write.
    """
    drafter.rewind([31, 64, 10])
    sequences = drafter.sequences([4, 3, 2])
    slots = torch.tensor([-1, 0, -1, 70, drafter.num_blocks * BLOCK_SIZE - 2, -1, 200, -1, -1])
    return replace(sequences, slots=slots)


def _random_qkv(drafter: EnginelessDrafter, sequences: Sequences, layers: int) -> torch.Tensor:
    shape = drafter.model.shape
    return torch.randn(layers, sequences.positions.shape[0], shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)


def _split(drafter: EnginelessDrafter, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shape = drafter.model.shape
    return qkv.flatten(0, 1).split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)


def _fill(drafter: EnginelessDrafter, value: float) -> None:
    drafter.pages.pages(slice(0, LAYERS)).fill_(value)


def _pages(drafter: EnginelessDrafter) -> np.ndarray:
    """Each layer's pages by the view that vLLM bound to it."""
    return torch.stack([layer.kv_cache for layer in drafter.pages.layers]).numpy()


def _write_one_by_one(
    drafter: EnginelessDrafter, sequences: Sequences, layers: slice, k: torch.Tensor, v: torch.Tensor
) -> None:
    row = 0
    for layer in list(drafter.pages.layers)[layers]:
        for slot in sequences.slots:
            if slot >= 0:
                layer.impl.do_kv_cache_update(layer, k[row : row + 1], v[row : row + 1], layer.kv_cache, slot.view(1))
            row += 1


def _refusals(drafter: EnginelessDrafter) -> dict[str, str]:
    """The errors for layouts that can't be used. Binds other pages, so it comes last."""
    layers, group, num_blocks = list(drafter.pages.layers), drafter.pages.group, drafter.num_blocks
    shape = layers[0].kv_cache.shape
    refusals = {"reversed": _refusal(layers[::-1], group, num_blocks), "odd": _refusal(layers, group, num_blocks - 1)}
    for layer in layers:
        layer.bind_kv_cache(torch.zeros(shape))
    refusals["scattered"] = _refusal(layers, group, num_blocks)
    block_outermost = torch.zeros(shape[0], len(layers), *shape[1:])
    for index, layer in enumerate(layers):
        layer.bind_kv_cache(block_outermost[:, index])
    refusals["block_outermost"] = _refusal(layers, group, num_blocks)
    return refusals


def _refusal(layers, group, num_blocks: int) -> str:
    try:
        PagedKV(layers, group, num_blocks, BLOCK_SIZE)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> list[Observed]:
    folder = tmp_path_factory.mktemp("drafter")
    make_checkpoint(CASE, folder)
    return run_ranks(RANKS, observe, str(folder))


def test_a_group_writes_its_live_slots_and_nothing_else(observed):
    for rank in observed:
        live = (rank.slots >= 0).sum()
        changed = (rank.group_write != CANARY).reshape(LAYERS, -1).sum(1)
        assert changed.tolist() == [0] + [live * KV_NUMBERS] * (LAYERS - 1)
        assert rank.group_write.tobytes() == rank.single_writes.tobytes()


def test_a_fuzzy_pass_writes_the_live_slots_of_every_layer_and_nothing_else(observed):
    for rank in observed:
        # Where these slots are in a page is up to the backend: take it from the single writes.
        in_a_layer = rank.single_writes[GROUP.start] != CANARY
        for layer in range(LAYERS):
            assert ((rank.pass_writes[layer] != CANARY) == in_a_layer).all()


@pytest.mark.parametrize("state", range(len(STATES)), ids=map(str, STATES))
def test_a_groups_call_is_its_layers_calls_bit_for_bit(state, observed):
    for rank in observed:
        (out, pages), (separate_out, separate_pages) = rank.grouped[state], rank.separate[state]
        assert np.isfinite(out).all() and np.abs(out).max() > 0.1
        assert out.tobytes() == separate_out.tobytes()
        assert pages.tobytes() == separate_pages.tobytes()


@pytest.mark.parametrize("state", range(len(STATES)), ids=map(str, STATES))
def test_the_virtual_batch_equals_a_slow_oracle(state, observed):
    lengths, new = STATES[state]
    for rank in observed:
        sequences, batch = rank.batches[state]
        slots, positions, tables, seq_lens, starts = [], [], [], [], [0]
        for layer in range(LAYERS):
            for request, (length, count) in enumerate(zip(lengths, new, strict=True)):
                table = [layer * rank.num_blocks + block for block in sequences.block_table[request].tolist()]
                tables.append(table)
                seq_lens.append(length + count)
                starts.append(starts[-1] + count)
                for position in range(length, length + count):
                    positions.append(position)
                    slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        assert batch.slots.tolist() == batch.slot_mapping.tolist() == slots
        assert batch.positions.tolist() == positions
        assert batch.block_table.tolist() == tables
        assert batch.seq_lens.tolist() == seq_lens
        assert batch.query_start_loc.tolist() == starts


@pytest.mark.parametrize("layout", ["reversed", "scattered", "block_outermost"])
def test_pages_that_do_not_follow_layer_after_layer_are_refused(layout, observed):
    for rank in observed:
        assert rank.refusals[layout].startswith("the drafter's K/V pages are not laid out one layer after another")
        assert "Choose a layer-compact K/V cache layout" in rank.refusals[layout]


def test_a_number_of_pages_that_blocks_do_not_divide_is_refused(observed):
    for rank in observed:
        blocks = rank.num_blocks
        expected = f"a drafter layer has {blocks} pages, no multiple of the {blocks - 1} cache blocks"
        assert rank.refusals["odd"] == expected


def test_newly_bound_pages_are_noticed(observed):
    assert [rank.current for rank in observed] == [(True, False)] * RANKS
