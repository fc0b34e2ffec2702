"""`CalibrationScheduler` against a slow oracle that follows each request separately."""

import random
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pytest
import torch

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.calibration import CalibrationScheduler, CalibrationStep
from vllm_easyspec.ops import REFERENCES

VOCAB = 50  # the drafter's; the target's is padded
TARGET_VOCAB = 64
MAX_LEN = 96
BLOCK_SIZE = 16
WIDTH = 12  # columns of the block table: the target may be longer than the drafter, and padding rows reach further


@dataclass
class Request:
    """One engine step of one request, as the engine sees it."""

    prefilling: bool
    start: int  # position of the first token that the target read
    accepted: list[int]  # tokens kept after the step, from `start`, without the newest
    rejected: int  # rejected drafts, read after them
    newest: int | None  # sampled by the target; None in the middle of a prompt
    blocks: list[int] = field(default_factory=list)

    @property
    def read(self) -> int:
        return len(self.accepted) + self.rejected

    def to_calibrate(self) -> list[tuple[int, int]]:
        """Position and token of everything whose K/V is not precise yet, the newest token last."""
        tokens = list(enumerate(self.accepted, self.start))
        if not self.prefilling:
            tokens = tokens[1:]  # the token sampled last round, calibrated then
        if self.newest is not None:
            tokens.append((self.start + len(self.accepted), self.newest))
        return tokens


def token(rng: random.Random) -> int:
    return rng.randrange(TARGET_VOCAB)


def decoding(rng: random.Random, max_drafts: int, start: int | None = None) -> Request:
    drafts = rng.randint(0, max_drafts)
    rejected = rng.randint(0, drafts)
    start = rng.randrange(1, MAX_LEN) if start is None else start
    return Request(False, start, [token(rng) for _ in range(1 + drafts - rejected)], rejected, token(rng))


def prefilling(rng: random.Random, first: bool, last: bool) -> Request:
    start = 0 if first else rng.randrange(1, MAX_LEN - 8)
    read = rng.randint(1, 40)
    return Request(True, start, [token(rng) for _ in range(read)], 0, token(rng) if last else None)


def to_batch(requests: list[Request], rng: random.Random, num_drafts: int = 3, dummy: bool = False) -> DraftBatch:
    ids, pool = [], list(range(1, 1 + len(requests) * WIDTH))
    rng.shuffle(pool)
    for request in requests:
        ids += request.accepted + [token(rng) for _ in range(request.rejected)]
        request.blocks = [pool.pop() for _ in range(WIDTH)]
    starts = [0, *accumulate(request.read for request in requests)]
    padding = [token(rng) for _ in range(rng.randrange(3))]  # of a batch as CUDA graphs want it
    return DraftBatch(
        num_reqs=len(requests),
        num_drafts=num_drafts,
        idx_mapping=torch.arange(len(requests)),
        input_ids=torch.tensor(ids + padding, dtype=torch.int32),
        query_starts=torch.tensor(starts[:-1]),
        start_positions=torch.tensor([request.start for request in requests]),
        num_valid=torch.tensor([len(request.accepted) for request in requests]),
        sampled=torch.tensor([request.newest is not None for request in requests]),
        newest=torch.tensor([token(rng) if request.newest is None else request.newest for request in requests]),
        block_table=torch.tensor([request.blocks for request in requests], dtype=torch.int32),
        query_lens=np.array([request.read for request in requests], dtype=np.int32),
        prefilling=np.array([request.prefilling for request in requests]),
        seq_lens_bound=np.array([request.start + request.read for request in requests], dtype=np.int32),
        dummy=dummy,
    )


def slot(request: Request, position: int) -> int:
    if position >= MAX_LEN:
        return -1
    return request.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def check(step: CalibrationStep, requests: list[Request]) -> None:
    sequences = step.sequences
    starts = sequences.query_start_loc.tolist()
    assert starts == sequences.query_start_loc_cpu.tolist()
    assert len(starts) == len(requests) + 1
    assert starts[-1] == step.input_ids.shape[0] == sequences.slots.shape[0] == sequences.positions.shape[0]
    assert sequences.slots.dtype == sequences.positions.dtype == torch.int64
    for index, request in enumerate(requests):
        rows = range(starts[index], starts[index + 1])
        expected = request.to_calibrate()
        # As many tokens as if nothing had been rejected and the prompt were complete: the host can't tell.
        assert len(rows) == request.read + request.prefilling
        for row, (position, expected_token) in zip(rows, expected, strict=False):
            assert step.input_ids[row] == min(expected_token, VOCAB - 1)
            assert sequences.positions[row] == min(position, MAX_LEN - 1)
            assert sequences.slots[row] == slot(request, position)
        for row in rows[len(expected) :]:
            assert sequences.slots[row] == -1
            assert 0 <= step.input_ids[row] < VOCAB
            assert 0 <= sequences.positions[row] < MAX_LEN
        assert step.newest_indices[index] == rows[len(expected) - 1]
        assert step.newest_positions[index] == expected[-1][0]
        # The last token's keys end at its own position, padding or not.
        assert sequences.seq_lens[index] == expected[0][0] + len(rows)
        assert sequences.seq_lens_bound[index] >= sequences.seq_lens[index]
        assert sequences.max_query_len >= len(rows)
        assert sequences.max_seq_len >= sequences.seq_lens[index]


@pytest.fixture(params=["operator", "reference"])
def scheduler(request, monkeypatch) -> CalibrationScheduler:
    if request.param == "reference":
        reference = REFERENCES[torch.ops.vllm_easyspec.calibration_inputs.default]
        monkeypatch.setattr("vllm_easyspec.calibration.calibration_inputs", reference)
    return CalibrationScheduler(VOCAB, MAX_LEN, BLOCK_SIZE, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(40))
def test_random_batches_equal_the_oracle(scheduler, seed):
    rng = random.Random(seed)
    kinds = [
        lambda: decoding(rng, max_drafts=6),
        lambda: decoding(rng, max_drafts=0),
        lambda: decoding(rng, max_drafts=6, start=rng.randrange(MAX_LEN - 6, MAX_LEN + 40)),
        lambda: prefilling(rng, first=True, last=False),
        lambda: prefilling(rng, first=False, last=False),
        lambda: prefilling(rng, first=False, last=True),
        lambda: prefilling(rng, first=True, last=True),
    ]
    requests = [rng.choice(kinds)() for _ in range(rng.randint(1, 9))]
    check(scheduler.plan(to_batch(requests, rng)), requests)


@pytest.mark.parametrize("rejected", range(5))
def test_a_decoding_request_calibrates_accepted_plus_one_tokens(scheduler, rejected):
    rng = random.Random(0)
    accepted_drafts = 4 - rejected
    request = Request(False, 30, [7, *range(10, 10 + accepted_drafts)], rejected, newest=42)
    step = scheduler.plan(to_batch([request], rng))
    check(step, [request])
    live = step.sequences.slots >= 0
    assert step.input_ids[live].tolist() == [*range(10, 10 + accepted_drafts), 42]
    assert step.sequences.positions[live].tolist() == list(range(31, 32 + accepted_drafts))
    assert step.input_ids[step.newest_indices].item() == 42


def test_calibration_does_not_depend_on_k(scheduler):
    """With K = 0 nothing is drafted, but the pages must be precise."""
    requests = [decoding(random.Random(1), 3), prefilling(random.Random(1), first=False, last=True)]
    without, with_drafts = (scheduler.plan(to_batch(requests, random.Random(0), num_drafts=k)) for k in (0, 5))
    check(without, requests)
    assert torch.equal(without.sequences.slots, with_drafts.sequences.slots)


def test_past_the_drafters_end_nothing_is_written(scheduler):
    rng = random.Random(0)
    requests = [
        Request(False, MAX_LEN - 2, [1, 2, 3, 4], 1, newest=5),  # crosses the end
        Request(False, MAX_LEN + 20, [1, 2], 2, newest=3),  # beyond it
        Request(True, MAX_LEN - 5, list(range(20)), 0, newest=None),
    ]
    step = scheduler.plan(to_batch(requests, rng))
    check(step, requests)
    live = (step.sequences.slots >= 0).split(step.sequences.query_start_loc.diff().tolist())
    assert [part.sum().item() for part in live] == [1, 0, 5]


def test_a_dummy_batch_writes_nothing(scheduler):
    rng = random.Random(0)
    requests = [decoding(rng, 3), prefilling(rng, first=True, last=True)]
    step = scheduler.plan(to_batch(requests, rng, dummy=True))
    assert (step.sequences.slots == -1).all()
    assert step.input_ids.shape[0] == sum(request.read + request.prefilling for request in requests)


def test_only_splits_the_writes_between_prefilling_and_decoding_requests(scheduler):
    rng = random.Random(0)
    requests = [decoding(rng, 3), prefilling(rng, True, True), decoding(rng, 3), prefilling(rng, False, False)]
    batch = to_batch(requests, rng)
    step = scheduler.plan(batch)
    of_req = np.repeat(np.arange(4), np.diff(step.sequences.query_start_loc))
    for prefilling_ones in (True, False):
        part = scheduler.only(step, batch, prefilling=prefilling_ones)
        chosen = torch.from_numpy(batch.prefilling[of_req] == prefilling_ones)
        assert torch.equal(part.sequences.slots[chosen], step.sequences.slots[chosen])
        assert (part.sequences.slots[~chosen] == -1).all()
        assert torch.equal(part.input_ids, step.input_ids)
