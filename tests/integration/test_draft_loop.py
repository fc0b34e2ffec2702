"""A round from recorded graphs is the eager round: same drafts, same pages, whatever the graphs were recorded on.

On vLLM's Triton attention backend, which refreshes its metadata on the device, its kernels in Triton's interpreter.
Graphs are recorded as tests/integration/recorded_graph.py does it, through vLLM's own graph manager.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import recorded_graph
import torch
from drafter_cases import CASES, make_checkpoint
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.plan import DraftPlan, PlanTable
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.graphs import DraftGraph
from vllm_easyspec.ranks import run_ranks
from vllm_easyspec.settings import DraftSettings

pytestmark = pytest.mark.engine
CASE = next(case for case in CASES if case.name == "mistral_tied")
K, MAX_REQS, MAX_LEN, BLOCK_SIZE = 3, 3, 96, 32
PLANS = {scope: DraftPlan((1, 2, 1), scope) for scope in ("attention", "block")}
SIZE = 3  # requests that a graph holds
DRAFTED = {1: None, 2: 40}  # by the number of ranks: the lowest ids that may be drafted; None: all
# Of each request of a round: tokens in the pages, how many tokens the target read, and how many of them are kept.
# Adaptive verification lets it read fewer than K + 1.
ROUNDS = [
    [(30, K + 1, 1), (62, K + 1, K + 1), (5, K + 1, 3)],
    [(33, K + 1, K + 1), (60, K + 1, 2)],
    [(33, 1, 1), (60, K + 1, K + 1), (9, 3, 2)],
]
State = list[tuple[int, int, int]]


@dataclass
class Seen:
    drafts: np.ndarray  # [reqs, K]
    pages: np.ndarray
    positions: np.ndarray


class Rounds:
    def __init__(self, folder: str, drafted: int | None):
        selector._cached_get_attn_backend.cache_clear()
        CpuPlatform.get_attn_backend_cls = classmethod(
            lambda cls, *_, **__: AttentionBackendEnum.TRITON_ATTN.get_path()
        )
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        recorded_graph.use()
        options = RuntimeOptions(draft_vocabulary=drafted)
        self.drafter = EnginelessDrafter(
            folder,
            options,
            max_num_reqs=MAX_REQS,
            max_len=MAX_LEN,
            block_size=BLOCK_SIZE,
            num_drafts=K,
            graph_sizes=[SIZE],
        )
        model, pages = self.drafter.model, self.drafter.pages
        self.loop = self.drafter.loop
        self.tokens = self.loop.draft_tokens
        self.graphs = self.drafter.graphs
        if pages.group:  # the decoding kernel that is fastest in the interpreter
            pages.group.get_metadata_builder().seq_threshold_3D = 0
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(model.shape.vocab_size, (MAX_REQS, 64), generator=generator).tolist()
        self.drafter.read(ids)
        self.pages = pages.pages(slice(0, len(pages.layers))) if pages.layers else torch.zeros(1)
        self.filled = self.pages.clone()

    def batch(self, state: State) -> DraftBatch:
        reqs = len(state)
        lengths, read, kept = torch.tensor(state).T.contiguous()
        # vLLM's own table is refilled each step, and zeroed where a graph of the target's pads.
        self.loop.block_table.zero_()
        self.loop.block_table[:reqs] = self.drafter.block_table[:reqs]
        generator = torch.Generator().manual_seed(int(lengths.sum()))
        return DraftBatch(
            num_reqs=reqs,
            num_drafts=K,
            idx_mapping=torch.arange(reqs),
            input_ids=torch.randint(50, (int(read.sum()),), generator=generator).int(),
            query_starts=read.cumsum(0) - read,
            start_positions=lengths,
            num_valid=kept,
            sampled=torch.ones(reqs, dtype=torch.bool),
            newest=torch.randint(50, (reqs,), generator=generator),
            block_table=self.loop.block_table[:reqs],
            query_lens=np.full(reqs, K + 1, dtype=np.int32),
            prefilling=np.zeros(reqs, dtype=bool),
            seq_lens_bound=(lengths + K + 1).int().numpy(),
            dummy=False,
        )

    @torch.inference_mode()
    def eager(self, state: State, scope: str) -> Seen:
        self.pages.copy_(self.filled)
        batch = self.batch(state)
        self.loop.calibrate(batch)
        self.loop.draft(batch.num_reqs, K, PLANS[scope], int(batch.seq_lens_bound.max()) + K)
        return self.seen(batch)

    @torch.inference_mode()
    def replayed(self, state: State, scope: str) -> Seen:
        self.pages.copy_(self.filled)
        self.loop.positions.random_(0, 50)  # of an earlier round
        self.loop.live.fill_(True)
        batch = self.batch(state)
        settings, before = DraftSettings(PlanTable.of(PLANS[scope]), K), self.drafter.runtime.statistics.replays
        self.drafter.runtime.calibrate(batch, settings)
        self.drafter.runtime.draft(batch, settings)
        assert self.drafter.runtime.statistics.replays == before + 2, "one graph a stage"
        return self.seen(batch)

    def seen(self, batch: DraftBatch) -> Seen:
        reqs = batch.num_reqs
        return Seen(
            self.tokens[:reqs].numpy().copy(), self.pages.numpy().copy(), self.loop.positions[:reqs].numpy().copy()
        )

    @torch.inference_mode()
    def record(self) -> None:
        self.loop.record(self.graphs, [DraftGraph.calibrate(SIZE, K + 1)])
        for plan in PLANS.values():
            self.drafter.runtime.capture([SIZE], [K], DraftSettings(PlanTable.of(plan), K))


def observe(folder: str, drafted: int | None) -> dict:
    rounds = Rounds(folder, drafted)
    before = rounds.pages.clone()
    rounds.record()
    found = {"untouched": torch.equal(before, rounds.pages), "captured": len(rounds.graphs.graphs)}
    for scope in ("attention", "block"):
        for index, state in enumerate(ROUNDS):
            found[scope, index] = rounds.eager(state, scope), rounds.replayed(state, scope)
    counters = [rounds.graphs.counters[DraftGraph.draft(SIZE, K, plan)] for plan in PLANS.values()]
    found["counters"] = [(each.passes, each.attention_calls, each.cache_writes) for each in counters]
    found["filled"] = rounds.filled.numpy()
    rounds.drafter.graph_sizes = [1, 2, 8]
    found["sizes"] = rounds.drafter._new_graphs().sizes
    return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    make_checkpoint(CASE, folder)
    return {ranks: run_ranks(ranks, observe, str(folder), drafted) for ranks, drafted in DRAFTED.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("index", range(len(ROUNDS)))
def test_a_replayed_round_is_the_eager_round(index, scope, ranks, observed):
    for found in observed[ranks]:
        eager, replayed = found[scope, index]
        assert len(set(eager.drafts.flatten().tolist())) > 2
        assert DRAFTED[ranks] is None or eager.drafts.max() < DRAFTED[ranks]
        assert eager.drafts.tolist() == replayed.drafts.tolist()
        assert eager.positions.tolist() == replayed.positions.tolist()
        # All pages: padding and rejected drafts wrote nothing.
        np.testing.assert_allclose(replayed.pages, eager.pages, atol=1e-5, rtol=1e-5)
        assert (eager.pages != found["filled"]).any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_recording_writes_no_page(ranks, observed):
    for found in observed[ranks]:
        assert found["untouched"]
        assert found["captured"] == 3


def test_a_full_batch_has_a_graph_though_vllm_captures_no_such_size(observed):
    assert observed[1][0]["sizes"] == [1, 2, MAX_REQS]


def test_a_replay_counts_what_its_passes_did(observed):
    (found,) = observed[1]
    groups, steps = len(PLANS["block"].groups), K - 1
    assert found["counters"] == [(steps, steps * groups, steps * groups)] * 2


def test_drafts_of_the_ranks_are_the_same(observed):
    first, second = observed[2]
    for key in [key for key in first if isinstance(key, tuple)]:
        assert first[key][1].drafts.tolist() == second[key][1].drafts.tolist()
