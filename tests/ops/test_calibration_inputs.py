"""calibration_inputs: the native kernel against its reference, which test_calibration.py compares with an oracle."""

import pytest
import torch

from vllm_easyspec.ops import REFERENCES, calibration_inputs

OPERATOR = torch.ops.vllm_easyspec.calibration_inputs.default
BLOCK_SIZE, MAX_LEN, VOCAB = 16, 90, 500


def arguments(lens, padding=0, write=True, seed=0):
    """Requests of these lengths, some prefilling, some near the end; then `padding` requests as a graph adds them.

    The same on every device.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        found = arguments_on_cpu(lens, padding, write, seed)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def arguments_on_cpu(lens, padding, write, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, size):
        return torch.randint(low, high, (size,), generator=generator)

    reqs = len(lens)
    lens = torch.tensor(lens)
    known = integers(0, 2, reqs)
    read_lens = lens - 1 + known
    known[read_lens == 0], read_lens[read_lens == 0] = 1, 1
    sampled = integers(0, 4, reqs) > 0
    fields = {
        "query_starts": torch.cat([torch.zeros(1, dtype=torch.int64), read_lens.cumsum(0)[:-1]]),
        "start_positions": integers(0, MAX_LEN + 20, reqs),
        "num_valid": torch.stack([read_lens - integers(0, 3, reqs), known]).amax(0),
        "sampled": sampled,
        "newest": integers(-1, VOCAB + 20, reqs),
    }
    for name, value in fields.items():
        fields[name] = torch.cat([value, value.new_zeros(padding)])
    lens = torch.cat([lens, torch.full((padding,), 3)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    of_req = torch.arange(len(lens)).repeat_interleave(lens)
    return {
        "read": integers(0, VOCAB + 20, int(read_lens.sum())).int(),
        **fields,
        "block_table": integers(0, 50, (reqs + padding + 2) * 9).view(-1, 9).int()[:, : -(-MAX_LEN // BLOCK_SIZE)],
        "of_req": of_req,
        "offset": torch.arange(len(of_req)) - starts[of_req],
        "known": torch.cat([known, torch.ones(padding, dtype=torch.int64)]),
        "starts": starts.int(),
        "block_size": BLOCK_SIZE,
        "max_len": MAX_LEN,
        "vocab_size": VOCAB,
        "write": write,
    }


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("lens", [[1], [6], [1, 1, 1], [6] * 8, [40, 1, 6, 2, 17]])
def test_native_equals_the_reference(native, lens, padding, write):
    for seed in range(20):
        args = arguments(lens, padding, write, seed)
        for got, expected in zip(calibration_inputs(**args), REFERENCES[OPERATOR](**args), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_slots_past_32_bits(native):
    args = arguments([4], seed=1) | {"max_len": 1 << 20, "start_positions": torch.tensor([20])}
    args["num_valid"], args["sampled"] = torch.tensor([4]), torch.tensor([True])
    args["block_table"] = torch.full((1, 6), 400_000_000, dtype=torch.int32)
    slots = calibration_inputs(**args)[2]
    assert slots.tolist() == [400_000_000 * BLOCK_SIZE + (20 + args["known"].item() + i) % BLOCK_SIZE for i in range(4)]


def test_schema_and_fake():
    torch.library.opcheck(OPERATOR, tuple(arguments([6, 2, 9], padding=1).values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("read", torch.zeros(9, dtype=torch.int64), "read has another dtype"),
        ("known", torch.zeros(4, dtype=torch.int64)[::2], "known is not contiguous"),
        ("starts", torch.zeros(2, dtype=torch.int32), "starts has 2 elements, not 3"),
        ("block_table", torch.zeros(1, 6, dtype=torch.int32), "block_table is not"),
    ],
)
def test_native_refuses_what_it_would_misread(native, name, value, message):
    with pytest.raises(RuntimeError, match=message):
        calibration_inputs(**(arguments([4, 3]) | {name: value}))
