"""`DraftLoop`: the passes of a round, calibration and `K-1` fuzzy steps, each eager or replayed from a CUDA graph.

Both ways run the same functions. A graph's inputs are in buffers that are never replaced, its intermediate results in
the graphs' memory pool. In a round of a request whose newest token is at position `P`, the calibration pass makes every
position up to `P` precise and gives draft 1; fuzzy step `j` reads draft `j` at position `P + j`, writes its fuzzy K/V
there, and gives draft `j + 1`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.calibration import CalibrationLayout, CalibrationScheduler, CalibrationStep
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.paged_kv import DecodePass, PagedKV, PagedPass
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.graphs import DraftGraph, DraftGraphs
from vllm_easyspec.metrics import PassCounters
from vllm_easyspec.uncalibrated import Span

# Samples draft `index` of the first `num_reqs` requests: (index, hidden states, positions, num_reqs, test_room).
# test_room: some position may be beyond the drafter's context, where there is nothing to sample.
Sample = Callable[[int, torch.Tensor, torch.Tensor, int, bool], None]


class DraftLoop:
    """Runs the passes of a round for one rank. It owns the buffers that graphs read."""

    def __init__(
        self,
        model: LayerParallelDrafter,
        pages: PagedKV,
        calibration: CalibrationScheduler,
        block_table: torch.Tensor,
        draft_tokens: torch.Tensor,
        sample: Sample,
    ):
        """block_table: `[max reqs, width] int32`, vLLM's own, refilled each step; draft_tokens: `[max reqs, K] int64`,
        which `sample` fills column by column."""
        self.model = model
        self.pages = pages
        self.calibration = calibration
        self.block_table = block_table
        self.draft_tokens = draft_tokens
        self.sample = sample
        self.precise = DraftPlan.precise(model.shape.num_layers)
        max_reqs, max_drafts = draft_tokens.shape
        device = draft_tokens.device
        self.positions = torch.zeros(max_reqs, dtype=torch.int64, device=device)  # of the newest token or draft
        self.live = torch.zeros(max_reqs, dtype=torch.bool, device=device)
        # A calibration graph's inputs from a DraftBatch: query_starts, start_positions, num_valid, sampled, newest.
        self.requests = torch.zeros(5, max_reqs, dtype=torch.int64, device=device)
        # Final hidden states of the newest tokens: the first step's look-ahead maps read them.
        self.newest = torch.zeros(max_reqs, model.shape.hidden_size, dtype=model.dtype, device=device)
        self.read_ids = torch.zeros(max_reqs * (max_drafts + 1), dtype=torch.int32, device=device)
        # Graphs have no indices in vLLM's request state.
        self.no_requests = torch.full((max_reqs,), -1, dtype=torch.int64, device=device)
        self.layouts: dict[tuple[int, int], CalibrationLayout] = {}  # that graphs read, by (requests, query_len)

    # ---- eager ----

    def calibrate(self, batch: DraftBatch, test_room: bool = False, ablation: DraftPlan | None = None) -> None:
        """One precise pass over the new tokens, then draft 1. ablation: a plan for generated tokens in place of it."""
        self.positions[batch.num_reqs :] = -1  # requests that may pad a draft graph
        self.live[batch.num_reqs :] = False
        # Padding tokens may reach past the longest request, hence more columns.
        more = 1 + self.draft_tokens.shape[1] // self.pages.block_size
        batch = replace(batch, block_table=torch.nn.functional.pad(batch.block_table, (0, more)))
        step = self.calibration.plan(batch)
        if ablation is None or batch.prefilling.all():
            hidden = self._pass(step, self.precise)
        elif not batch.prefilling.any():
            hidden = self._pass(step, ablation)
        else:  # prompts get precise K/V, generated tokens keep fuzzy K/V
            precise = self._pass(self.calibration.only(step, batch, prefilling=True), self.precise)
            fuzzy = self._pass(self.calibration.only(step, batch, prefilling=False), ablation)
            prefilling = torch.from_numpy(batch.prefilling).to(precise.device)
            hidden = torch.where(prefilling.unsqueeze(1), precise, fuzzy)
        self._first_draft(batch, step, hidden, test_room)

    def catch_up(self, batch: DraftBatch, spans: Sequence[Span], token_ids: torch.Tensor) -> torch.Tensor:
        """Read tokens of earlier rounds precisely. Returns their slots. token_ids: as in `catching_up`."""
        input_ids, sequences = self.calibration.catching_up(batch, spans, token_ids)
        self.model(input_ids, self.precise, PagedPass(self.pages, sequences))
        return sequences.slots

    def draft(
        self,
        num_reqs: int,
        num_drafts: int,
        plan: DraftPlan,
        max_seq_len: int,
        lookahead: bool = False,
        test_room: bool = False,
    ) -> None:
        """Drafts 2 to `num_drafts`. max_seq_len: upper bound on the sequence lengths; lookahead: use the maps."""
        positions = self.positions[:num_reqs]
        attention = DecodePass(
            self.pages,
            positions,
            self.live[:num_reqs],
            self.block_table[:num_reqs],
            self.model.largest_share(plan),
            self.calibration.max_len,
            max_seq_len,
        )
        hidden = self.newest[:num_reqs]
        for index in range(1, num_drafts):
            attention.advance(self.draft_tokens[:num_reqs, index - 1])
            hidden = self.model(attention.input_ids, plan, attention, hidden if lookahead else None)
            self.sample(index, hidden, positions, num_reqs, test_room)

    def _pass(self, step: CalibrationStep, plan: DraftPlan) -> torch.Tensor:
        """Hidden states of the newest tokens, `[reqs, hidden]`."""
        return self.model(step.input_ids, plan, PagedPass(self.pages, step.sequences))[step.newest_indices]

    def _first_draft(self, batch: DraftBatch, step: CalibrationStep, hidden: torch.Tensor, test_room: bool) -> None:
        self.positions[: batch.num_reqs] = step.newest_positions
        self.live[: batch.num_reqs] = batch.sampled & (not batch.dummy)
        self.newest[: batch.num_reqs] = hidden
        if batch.num_drafts > 0:
            self.sample(0, hidden, step.newest_positions, batch.num_reqs, test_room)

    # ---- from graphs ----

    def record(self, graphs: DraftGraphs, wanted: list[DraftGraph], test_room: bool = False) -> None:
        """Capture the graphs. No page is written meanwhile, since no request is live."""
        self.positions.fill_(-1)
        self.live.zero_()
        self.requests.zero_()
        for graph in wanted:
            if graph.stage == "calibrate":
                self._layout(graph)  # copied from the host, which a capture can't do
        graphs.record(wanted, lambda graph: self._run(graph, test_room))

    def load(self, batch: DraftBatch, graph: DraftGraph) -> None:
        """Copy the batch to where a calibration graph reads it. Requests that pad the graph have position -1."""
        reqs = batch.num_reqs
        tokens = min(reqs * graph.query_len, len(batch.input_ids))  # fewer where adaptive verification left out drafts
        fields = (batch.query_starts, batch.start_positions, batch.num_valid, batch.sampled.long(), batch.newest)
        torch.stack(fields, out=self.requests[:, :reqs])
        self.requests[:, reqs : graph.num_reqs] = 0
        self.read_ids[:tokens] = batch.input_ids[:tokens]

    def _run(self, graph: DraftGraph, test_room: bool) -> PassCounters:
        self.model.counters = PassCounters()
        reqs, max_len = graph.num_reqs or 0, self.calibration.max_len
        if graph.stage == "calibrate":
            batch, layout = self._graph_batch(graph), self._layout(graph)
            step = self.calibration.plan(batch, layout)
            self._first_draft(batch, step, self._pass(step, self.precise), test_room)
        else:
            assert graph.plan is not None
            self.draft(reqs, graph.num_drafts, graph.plan, max_len, graph.lookahead, test_room)
        counted, self.model.counters = self.model.counters, PassCounters()  # of the next pass
        return counted

    def _layout(self, graph: DraftGraph) -> CalibrationLayout:
        key = graph.num_reqs or 0, graph.query_len
        if key not in self.layouts:
            query_lens = np.full(key[0], graph.query_len, dtype=np.int32)
            self.layouts[key] = self.calibration.layout(query_lens, np.zeros(key[0], dtype=bool))
        return self.layouts[key]

    def _graph_batch(self, graph: DraftGraph) -> DraftBatch:
        """The batch that `load` copied, as views of the buffers."""
        reqs = graph.num_reqs or 0
        query_starts, start_positions, num_valid, sampled, newest = self.requests[:, :reqs]
        live = sampled > 0
        return DraftBatch(
            num_reqs=reqs,
            num_drafts=graph.num_drafts,
            idx_mapping=self.no_requests[:reqs],
            input_ids=self.read_ids[: reqs * graph.query_len],
            query_starts=query_starts,
            start_positions=start_positions,
            num_valid=num_valid,
            sampled=live,
            newest=newest,
            block_table=torch.where(live.unsqueeze(1), self.block_table[:reqs], 0),
            query_lens=np.full(reqs, graph.query_len, dtype=np.int32),
            prefilling=np.zeros(reqs, dtype=bool),
            seq_lens_bound=np.full(reqs, self.calibration.max_len - 1, dtype=np.int32),
            dummy=False,
        )
