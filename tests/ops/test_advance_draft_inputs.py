"""advance_draft_inputs: the reference and the native kernel against a loop over rows and layers."""

import copy

import pytest
import torch

from vllm_easyspec.ops import REFERENCES, advance_draft_inputs

OPERATOR = torch.ops.vllm_easyspec.advance_draft_inputs.default
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 16, 50, 90


@pytest.fixture(params=["reference", "operator"])
def advance(request):
    return {"reference": REFERENCES[OPERATOR], "operator": advance_draft_inputs}[request.param]


def arguments(rows, layers, seed=0):
    """Random rows, every third padding, drafts a column of a wider buffer, tables rows of a wider buffer."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def integers(high, *size):
        return torch.randint(0, high, size, generator=generator)

    positions = integers(MAX_LEN + 20, rows)
    positions[2::3] = -1
    return {
        "sampled": integers(500, rows, 7)[:, 3],
        "positions": positions,
        "live": integers(4, rows) > 0,
        "block_table": integers(NUM_BLOCKS, rows + 2, 9).int()[:rows, : -(-MAX_LEN // BLOCK_SIZE)],
        "input_ids": torch.full((rows,), 77),
        "query_positions": torch.full((layers * rows,), 77),
        "seq_lens": torch.full((layers * rows,), 77, dtype=torch.int32),
        "slots": torch.full((layers * rows,), 77),
        "block_size": BLOCK_SIZE,
        "num_blocks": NUM_BLOCKS,
        "max_len": MAX_LEN,
    }


def by_loops(sampled, positions, live, block_table, block_size, num_blocks, max_len, layers):
    """(positions, ids, query positions, lengths, slots), the last three layer after layer."""
    positions = [-1 if p < 0 else p + 1 for p in positions.tolist()]
    ids = [0 if p < 0 else draft for p, draft in zip(positions, sampled.tolist(), strict=True)]
    query = [0 if p < 0 else min(p, max_len - 1) for p in positions]
    lengths = [1 if p < 0 else min(p + 1, max_len) for p in positions]
    slots = []
    for layer in range(layers):
        for row, position in enumerate(positions):
            if position < 0 or position >= max_len or not live[row]:
                slots.append(-1)
            else:
                block = layer * num_blocks + int(block_table[row, position // block_size])
                slots.append(block * block_size + position % block_size)
    return positions, ids, layers * query, layers * lengths, slots


@pytest.mark.parametrize("layers", [1, 4, 11])
@pytest.mark.parametrize("rows", [1, 2, 8, 65])
def test_equals_the_loop(advance, rows, layers):
    args = arguments(rows, layers, seed=rows)
    read = {k: copy.copy(v) for k, v in args.items() if k not in ("input_ids", "query_positions", "seq_lens", "slots")}
    read["positions"] = args["positions"].clone()
    expected = by_loops(**read, layers=layers)
    advance(**args)
    got = [args[name].tolist() for name in ("positions", "input_ids", "query_positions", "seq_lens", "slots")]
    assert got == list(expected)


def test_steps_follow_one_another_past_the_end_of_the_context(advance):
    """A request four tokens before the end of the drafter's context, over six steps."""
    args = arguments(1, 2)
    args["positions"].fill_(MAX_LEN - 4)
    args["live"].fill_(True)
    seen = []
    for _ in range(6):
        advance(**args)
        seen.append((args["positions"].item(), args["seq_lens"][0].item(), args["slots"][1].item() >= 0))
    assert seen == [(87, 88, True), (88, 89, True), (89, 90, True), (90, 90, False), (91, 90, False), (92, 90, False)]


def test_a_smaller_group_takes_a_prefix_and_the_rest_stays(advance):
    args, layers, rows = arguments(5, 4), 4, 5
    buffers = {name: args[name].clone() for name in ("query_positions", "seq_lens", "slots")}
    whole = copy.deepcopy(args)
    advance(**whole)
    advance(**(args | {name: buffer[: 2 * rows] for name, buffer in buffers.items()}))
    for name, buffer in buffers.items():
        assert buffer[: 2 * rows].equal(whole[name][: 2 * rows])
        assert (buffer[2 * rows :] == 77).all() and buffer.numel() == layers * rows


def test_slots_past_32_bits(advance):
    args = arguments(2, 80)
    args |= {"num_blocks": 5_000_000}
    args["positions"][:] = 20
    args["live"].fill_(True)
    args["block_table"].fill_(4_999_999)
    advance(**args)
    assert args["slots"][-1].item() == (79 * 5_000_000 + 4_999_999) * BLOCK_SIZE + 21 % BLOCK_SIZE


def test_no_rows(advance):
    advance(**arguments(0, 3))


def test_schema_fake_and_mutation():
    torch.library.opcheck(OPERATOR, tuple(arguments(5, 3).values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seq_lens", torch.zeros(12, dtype=torch.int64), "seq_lens has another dtype"),
        ("query_positions", torch.zeros(11, dtype=torch.int64), "query_positions has 11 elements, not 12"),
        ("slots", torch.zeros(24, dtype=torch.int64)[::2], "slots is not contiguous"),
        ("block_table", torch.zeros(3, 6, dtype=torch.int32), "block_table is not"),
    ],
)
def test_native_refuses_what_it_would_misread(native, name, value, message):
    with pytest.raises(RuntimeError, match=message):
        advance_draft_inputs(**(arguments(4, 3) | {name: value}))
