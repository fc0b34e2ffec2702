"""Rounds of a real drafter under whatever vLLM may do between them, against the method written out in plain PyTorch.

Requests arrive, are read in chunks, decode with any number of verified and accepted drafts, are left out of a step,
preempted, or end; rounds pause; the batch changes. After every round each request's pages must hold the precise K/V of
its tokens, and its drafts must be those of the plain implementation.
"""

import copy
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from drafter_cases import CASES, VOCAB, make_checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import DenseRequest
from transformers import AutoModelForCausalLM

from vllm_easyspec.audit import _page_difference
from vllm_easyspec.batch import DraftBatch, DraftBounds
from vllm_easyspec.drafter.plan import DraftPlan, PlanTable
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.ranks import run_ranks
from vllm_easyspec.settings import DraftSettings

pytestmark = pytest.mark.engine
EXAMPLES = int(os.environ.get("EASYSPEC_FUZZ_EXAMPLES", "15"))
CASE = next(case for case in CASES if case.name == "llama3_rope")
K, REQUESTS, ROWS, BLOCK_SIZE, TABLE_LEN = 3, 3, 5, 32, 128
MAX_LEN = 100  # of the drafter; the target's context is longer
BUDGET = 48  # tokens that a round catches up
TOLERANCE = 1e-4
PLANS = [
    DraftPlan(sizes, scope) for sizes, scope in [((1, 4, 1), "attention"), ((2, 3, 1), "block"), ((6,), "attention")]
]

# Of each request of a round: what happens to it, and how much.
ACTIONS = st.tuples(st.sampled_from(["go", "go", "go", "go", "rest", "preempt", "end"]), st.integers(0, 60))
ROUNDS = st.lists(
    st.tuples(
        st.lists(ACTIONS, min_size=REQUESTS, max_size=REQUESTS),
        st.sampled_from([False, False, False, True]),  # whether a pause begins or ends
        st.integers(1, K),
        st.sampled_from(PLANS),
    ),
    min_size=10,
    max_size=30,
)


@dataclass
class Request:
    name: str
    tokens: list[int]  # all that it will ever have
    prefill_len: int  # of them, those that it was given: the prompt; after a preemption what was sampled, too
    row: int  # of the block table
    computed: int = 0  # tokens that the target has read
    drafted: int = 0  # drafts for its next step
    dense: DenseRequest | None = None  # all tokens, read precisely

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prefill_len


class Simulation:
    """vLLM's side of the rounds, and the checks."""

    def __init__(self, drafter: EnginelessDrafter, reference: torch.nn.Module):
        self.drafter, self.runtime, self.reference = drafter, drafter.runtime, reference
        self.runtime.bounds = DraftBounds(K, MAX_LEN, graphs_test_room=False)
        self.runtime.loop.calibration.max_len = self.runtime.uncalibrated.max_len = MAX_LEN
        self.runtime.uncalibrated.marks.zero_()
        self.runtime.uncalibrated.any = False
        self.runtime.uncalibrated.up_to_date.clear()
        self.random = np.random.default_rng(0)
        self.free = list(range(ROWS))
        self.names = 0
        self.requests = [self.arrive(10 + 20 * i) for i in range(REQUESTS)]
        self.paused = False

    def arrive(self, prompt: int) -> Request:
        self.names += 1
        tokens = self.random.integers(0, VOCAB, TABLE_LEN).tolist()
        request = Request(f"request {self.names}", tokens, 1 + prompt, self.free.pop(0))
        request.dense = DenseRequest(self.reference, None)
        request.dense.read(tokens, [1] * CASE.config.num_hidden_layers, "attention")
        return request

    def round(self, actions, toggles: bool, num_drafts: int, plan: DraftPlan) -> None:
        if toggles:
            self.paused = not self.paused
        batch: list[tuple[Request, int, int]] = []  # request, tokens that the target reads, those that are kept
        for index, (action, amount) in enumerate(actions):
            request = self.requests[index]
            if action == "end" or request.computed + K + 2 >= TABLE_LEN:
                self.free.append(request.row)
                self.requests[index] = self.arrive(amount)
            elif action == "preempt" and request.computed:
                self.free.append(request.row)
                request.prefill_len = max(request.prefill_len, request.computed + 1)
                request.row, request.computed, request.drafted = self.free.pop(0), 0, 0
            elif action == "go":
                batch.append((request, *self.step(request, amount)))
        if batch:
            self.run(batch, 0 if self.paused else num_drafts, plan)

    def step(self, request: Request, amount: int) -> tuple[int, int]:
        if request.prefilling:
            read = min(1 + amount, request.prefill_len - request.computed)
            return read, read
        drafts = request.drafted if amount % 5 else amount % (request.drafted + 1)  # adaptive verification: fewer
        return 1 + drafts, 1 + amount % (drafts + 1)

    def run(self, batch: list[tuple[Request, int, int]], num_drafts: int, plan: DraftPlan) -> None:
        drafts = self.as_batch(batch, num_drafts)
        runtime, settings = self.runtime, DraftSettings(PlanTable.of(plan), K)
        if self.paused:
            runtime.uncalibrated.mark(drafts)
        else:
            if runtime.uncalibrated.any:
                token_ids = torch.tensor([request.tokens for request, _, _ in batch], dtype=torch.int32)
                runtime.catch_up(drafts, [request.name for request, _, _ in batch], BUDGET, token_ids)
            runtime.calibrate(drafts, settings)
            runtime.draft(drafts, settings)
        sampled = drafts.sampled.tolist()
        for row, (request, _, kept) in enumerate(batch):
            request.computed += kept
            request.drafted = num_drafts if sampled[row] else 0
        for request in self.requests:
            self.check_pages(request)
        if not self.paused:
            for row, (request, _, _) in enumerate(batch):
                if sampled[row] and request.name in runtime.uncalibrated.up_to_date | self.never_behind():
                    self.check_drafts(request, self.drafter.draft_tokens[row, :num_drafts].tolist(), plan)

    def never_behind(self) -> set[str]:
        return set() if self.runtime.uncalibrated.any else {request.name for request in self.requests}

    def as_batch(self, batch: list[tuple[Request, int, int]], num_drafts: int) -> DraftBatch:
        table = self.runtime.loop.block_table
        table.zero_()
        ids, scheduled = [], []
        for row, (request, read, kept) in enumerate(batch):
            table[row] = self.drafter.block_table[request.row]
            true = request.tokens[request.computed : request.computed + kept]
            rejected = [(request.tokens[request.computed + kept] + 1 + i) % VOCAB for i in range(read - kept)]
            ids += true + rejected
            scheduled.append(read if request.prefilling else 1 + request.drafted)
        reads, kept = (torch.tensor([step[i] for step in batch]) for i in (1, 2))
        computed = torch.tensor([request.computed for request, _, _ in batch])
        prefilling = np.array([request.prefilling for request, _, _ in batch])
        prefill_len = torch.tensor([request.prefill_len for request, _, _ in batch])
        newest = torch.tensor([request.tokens[request.computed + kept] for request, _, kept in batch])
        return DraftBatch(
            num_reqs=len(batch),
            num_drafts=num_drafts,
            idx_mapping=torch.arange(len(batch)),
            input_ids=torch.tensor(ids, dtype=torch.int32),
            query_starts=reads.cumsum(0) - reads,
            start_positions=computed,
            num_valid=kept,
            sampled=computed + kept >= prefill_len,
            newest=newest,
            block_table=table[: len(batch)],
            query_lens=np.array(scheduled, dtype=np.int32),
            prefilling=prefilling,
            seq_lens_bound=(computed.numpy() + scheduled).astype(np.int32),
            dummy=False,
        )

    def check_pages(self, request: Request) -> None:
        """As the audit of an engine chooses the positions."""
        if not request.computed:
            return
        tokens = min(request.computed + (not request.prefilling), MAX_LEN)
        table = self.drafter.block_table[request.row : request.row + 1]
        last = torch.tensor([request.computed - 1])
        tokens = min(tokens, int(self.runtime.uncalibrated.first_uncalibrated(table, last)))
        for index, layer in zip(self.runtime.model.local_layers, self.runtime.pages.layers, strict=True):
            k, v = (cached[index][:tokens] for cached in (request.dense.keys, request.dense.values))
            difference = _page_difference(layer, self.runtime.pages, table[0].long(), k, v)
            assert difference < TOLERANCE, (request.name, request.computed, index)

    def check_drafts(self, request: Request, drafts: list[int], plan: DraftPlan) -> None:
        dense = copy.copy(request.dense)
        dense.rewind(request.computed)
        token, sizes = request.tokens[request.computed], [1] * CASE.config.num_hidden_layers
        for index, draft in enumerate(drafts):
            if request.computed + index >= MAX_LEN:
                return
            logits = dense.read([token], sizes, plan.scope)[-1]
            assert logits[draft] > logits.max() - TOLERANCE, (request.name, request.computed, index)
            token, sizes = draft, list(plan.group_sizes)


def explore(folder: str, examples: int, phases: tuple[Phase, ...]) -> int:
    """Returns the number of rounds."""
    torch.set_num_threads(1)  # small products: threads that wait for a busy core would only slow them down
    drafter = EnginelessDrafter(folder, max_num_reqs=ROWS, max_len=TABLE_LEN, block_size=BLOCK_SIZE, num_drafts=K)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(ROUNDS)
    def explored(rounds) -> None:
        nonlocal count
        simulation = Simulation(drafter, reference)
        for one in rounds:
            simulation.round(*one)
            count += 1

    explored()
    return count


@pytest.mark.parametrize("ranks", [1, 2])
def test_rounds(ranks, tmp_path):
    """On two ranks without shrinking: a rank that fails would explore on, alone."""
    make_checkpoint(CASE, tmp_path)
    phases = (Phase.generate, Phase.shrink) if ranks == 1 else (Phase.generate,)
    counts = run_ranks(ranks, explore, str(tmp_path), EXAMPLES, phases, timeout_s=3600 if EXAMPLES > 100 else 300)
    assert min(counts) >= 10 * EXAMPLES
