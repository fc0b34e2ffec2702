"""`UncalibratedBlocks` against a slow oracle: blocks, with requests that arrive, share prefixes, pause, draft, end."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.uncalibrated import Span, UncalibratedBlocks

BLOCK_SIZE = 4
BLOCKS, WIDTH = 40, 12
MAX_LEN = 40  # of the drafter; the table reaches further


@dataclass
class Request:
    name: str
    prompt: int  # its length
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Engine:
    """What vLLM and the drafter do, position by position. precise: (block, offset) that the drafter has read."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.uncalibrated = UncalibratedBlocks(BLOCKS, BLOCK_SIZE, MAX_LEN, torch.device("cpu"))
        self.free = list(range(1, BLOCKS))
        self.precise: set[tuple[int, int]] = set()
        self.requests: list[Request] = []
        self.cached: list[int] = []  # the blocks of a finished request's prompt, which the next ones share
        self.names = 0

    def arrive(self) -> None:
        hits = self.rng.randint(0, len(self.cached))
        request = Request(f"request {self.names}", hits * BLOCK_SIZE + self.rng.randint(1, 12))
        self.names += 1
        request.blocks, request.computed = self.cached[:hits], hits * BLOCK_SIZE
        self.requests.append(request)

    def finish(self, request: Request) -> None:
        self.requests.remove(request)
        shared = {block for other in self.requests for block in other.blocks}
        if not shared & set(self.cached):  # the next ones share this one's prefix
            self.free += [block for block in self.cached if block not in request.blocks]
            full = min(request.computed // BLOCK_SIZE, 4)
            self.free += request.blocks[full:]
            self.cached = request.blocks[:full]
        else:
            self.free += [block for block in request.blocks if block not in self.cached]

    def step(self, pause: bool, budget: int) -> list[Span]:
        """One round of all requests that get blocks. Returns what had to be read before it."""
        batch, reads = [], []
        for request in self.requests:
            prefilling = request.computed < request.prompt
            read = self.rng.randint(1, request.prompt - request.computed) if prefilling else self.rng.randint(1, 4)
            needed = -(-(request.computed + read + 1) // BLOCK_SIZE) - len(request.blocks)  # and the newest token's
            if needed > len(self.free) or request.computed + read >= WIDTH * BLOCK_SIZE:
                continue
            for _ in range(needed):
                request.blocks.append(self.free.pop(self.rng.randrange(len(self.free))))
            batch.append((request, prefilling))
            reads.append(read)
        if not batch:
            return []
        drafts = self.as_batch(batch, reads)
        kept = drafts.num_valid.tolist()
        spans: list[Span] = []
        if pause:
            self.uncalibrated.mark(drafts)
        elif self.uncalibrated.any:
            spans = self.uncalibrated.spans_to_calibrate(drafts, [request.name for request, _ in batch], budget)
            for span in spans:
                self.write(batch[span.req][0], range(span.begin, span.end))
            positions = [(batch[s.req][0], position) for s in spans for position in range(s.begin, s.end)]
            if positions:
                slots = [r.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for r, p in positions]
                self.uncalibrated.mark_calibrated(torch.tensor(slots))
        behind = {request.name for request, _ in batch} - self.uncalibrated.up_to_date if not pause else set()
        for (request, prefilling), valid in zip(batch, kept, strict=True):
            first = request.computed + (not prefilling)
            request.computed += valid
            if not pause and not (self.uncalibrated.any and request.name in behind):
                self.write(request, range(first, min(request.computed + 1, MAX_LEN)))
            else:  # not calibrated, or calibrated on uncalibrated pages: not precise
                for position in range(first, request.computed):
                    self.precise.discard((request.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE))
        return spans

    def as_batch(self, batch: list[tuple[Request, bool]], reads: list[int]) -> DraftBatch:
        table = torch.full((len(batch), WIDTH), BLOCKS - 1, dtype=torch.int32)  # beyond its blocks: anything
        for row, (request, _) in enumerate(batch):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        starts = np.array([request.computed for request, _ in batch])
        valid = [
            read if prefilling else self.rng.randint(1, read)
            for (_, prefilling), read in zip(batch, reads, strict=True)
        ]
        empty = torch.zeros(0)
        return DraftBatch(
            num_reqs=len(batch),
            num_drafts=3,
            idx_mapping=empty,
            input_ids=empty,
            query_starts=empty,
            start_positions=torch.from_numpy(starts),
            num_valid=torch.tensor(valid),
            sampled=empty,
            newest=empty,
            block_table=table,
            query_lens=np.array(reads, dtype=np.int32),
            prefilling=np.array([prefilling for _, prefilling in batch]),
            seq_lens_bound=(starts + reads).astype(np.int32),
            dummy=False,
        )

    def write(self, request: Request, positions: range) -> None:
        self.precise |= {(request.blocks[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in positions}

    def check(self) -> None:
        """In a block without a mark every position that the target has computed is precise."""
        for request in self.requests:
            for position in range(min(request.computed, MAX_LEN)):
                block = request.blocks[position // BLOCK_SIZE]
                known = (block, position % BLOCK_SIZE) in self.precise
                assert known or self.uncalibrated.marks[block], (request, position)


@pytest.mark.parametrize("new_weights", [False, True])
@pytest.mark.parametrize("budget", [4, 12, 1000])
@pytest.mark.parametrize("seed", range(12))
def test_a_block_without_a_mark_is_precise(seed, budget, new_weights):
    engine = Engine(seed)
    pause, reads = False, 0
    for _ in range(120):
        if len(engine.requests) < 4 and engine.rng.random() < 0.5:
            engine.arrive()
        if engine.requests and engine.rng.random() < 0.15:
            engine.finish(engine.rng.choice(engine.requests))
        if engine.rng.random() < 0.2:
            pause = not pause
        if new_weights and engine.rng.random() < 0.05:
            engine.precise.clear()
            engine.uncalibrated.mark_all()
        spans = engine.step(pause, budget)
        reads += len(spans)
        assert sum(span.end - span.begin for span in spans) <= max(budget, BLOCK_SIZE)
        engine.check()
    assert reads > 0


def batch_of(start: int, read: int, prefilling: bool) -> tuple[Engine, DraftBatch]:
    engine = Engine(0)
    request = Request("one", start + read if prefilling else 1, start, list(range(1, WIDTH + 1)))
    return engine, engine.as_batch([(request, prefilling)], [read])


def test_what_was_paused_is_read_once_and_from_its_block_on():
    engine, paused = batch_of(start=9, read=1, prefilling=False)
    engine.uncalibrated.mark(paused)
    assert engine.uncalibrated.marks[1:].nonzero().flatten().tolist() == [2]  # block 3: positions 8 to 11
    _, drafting = batch_of(start=10, read=1, prefilling=False)
    assert engine.uncalibrated.spans_to_calibrate(drafting, ["one"], 100) == [Span(0, 8, 11)]
    engine.uncalibrated.mark_calibrated(torch.tensor([12, 13, 14]))
    assert engine.uncalibrated.spans_to_calibrate(drafting, ["one"], 100) == []


def test_more_than_the_budget_is_read_in_several_rounds():
    engine, paused = batch_of(start=0, read=20, prefilling=True)
    engine.uncalibrated.mark(paused)
    _, drafting = batch_of(start=20, read=1, prefilling=False)
    found = []
    for _ in range(3):
        spans = engine.uncalibrated.spans_to_calibrate(drafting, ["one"], 10)
        found += [(span.begin, span.end) for span in spans]
        assert ("one" in engine.uncalibrated.up_to_date) == (found[-1][1] == 21)
        engine.uncalibrated.mark_calibrated(
            torch.tensor([4 + position for span in spans for position in range(span.begin, span.end)])
        )
    assert found == [(0, 8), (8, 16), (16, 21)]


def test_beyond_the_drafters_context_nothing_is_read():
    engine, paused = batch_of(start=MAX_LEN - 2, read=4, prefilling=True)
    engine.uncalibrated.mark(paused)
    _, drafting = batch_of(start=MAX_LEN + 2, read=1, prefilling=False)
    assert engine.uncalibrated.spans_to_calibrate(drafting, ["one"], 100) == [Span(0, MAX_LEN - 4, MAX_LEN)]


def test_copied_blocks_take_their_marks_along():
    engine, paused = batch_of(start=0, read=4, prefilling=True)
    engine.uncalibrated.copied([(1, 7)])
    engine.uncalibrated.mark(paused)
    engine.uncalibrated.copied([(1, 7), (2, 8)])
    assert engine.uncalibrated.marks[[1, 2, 7, 8]].tolist() == [True, False, True, False]


def test_the_host_forgets_marks_once_there_are_none():
    engine, paused = batch_of(start=0, read=3, prefilling=True)
    engine.uncalibrated.mark(paused)
    _, drafting = batch_of(start=3, read=1, prefilling=False)
    assert engine.uncalibrated.spans_to_calibrate(drafting, ["one"], 100) == [Span(0, 0, 4)]
    engine.uncalibrated.mark_calibrated(torch.tensor([4, 5, 6, 7]))
    engine.uncalibrated.spans_to_calibrate(drafting, ["another"], 100)
    assert not engine.uncalibrated.any
