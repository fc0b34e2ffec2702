"""`EasySpecSpeculator`: vLLM's speculator interface in, one round out: calibrate, draft; vLLM's target verifies."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, replace
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.calibration import CalibrationScheduler
from vllm_easyspec.config import Calibration, ConfigError, PlanTable, RuntimeOptions
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.paged_kv import DrafterAttention, PagedKV, UnpagedPass
from vllm_easyspec.drafter.plan import SCOPES, LayerPlan, Scope
from vllm_easyspec.drafter.products import choose_products
from vllm_easyspec.drafter.xformers_attention import choose as choose_attention
from vllm_easyspec.drafter.xformers_attention import is_chosen
from vllm_easyspec.drafting import DraftLoop
from vllm_easyspec.graphs import DraftGraph, DraftGraphs
from vllm_easyspec.lookahead import LookaheadFile, LookaheadMaps, checkpoint_folder
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.plugin import DRAFTER_ARCHITECTURE
from vllm_easyspec.support import check_attention_backend
from vllm_easyspec.unread import UnreadBlocks

logger = init_logger("vllm.easyspec")

# Drafted where the drafter can't draft (its context is full, or K was lowered at run time): any valid id will do, the
# target tests it like every draft.
FILLER = 0


@dataclass(frozen=True)
class Drafting:
    """What may be swapped in a running engine."""

    plan: LayerPlan
    scope: Scope
    num_drafts: int  # K, at most the configured one
    calibration: Calibration
    lookahead: bool = False  # whether groups take their look-ahead maps
    by_batch_size: PlanTable = ()  # larger batches take the plan above

    def choice(self, num_reqs: int) -> tuple[LayerPlan, Scope]:
        """Plan and scope for a round of `num_reqs` requests."""
        for up_to, plan, scope in self.by_batch_size:
            if up_to is None or num_reqs <= up_to:
                return plan, scope
        return self.plan, self.scope

    @property
    def plans(self) -> list[LayerPlan]:
        return [self.plan, *(plan for _, plan, _ in self.by_batch_size)]


class EasySpecSpeculator(DraftModelSpeculator):
    # A prefilling request's calibration reads one token more than its step: the newest one.
    num_extra_query_per_req = 1
    model: LayerParallelDrafter

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        self.options = RuntimeOptions.from_vllm(vllm_config)
        num_layers = self.draft_model_config.hf_config.num_hidden_layers
        layer_parallel = self.options.layer_parallel
        self.precise = LayerPlan.precise(num_layers)
        self.configured = self.drafting = Drafting(
            layer_parallel.plan(num_layers),
            layer_parallel.scope,
            self.num_speculative_steps,
            self.options.calibration,
            self.options.lookahead is not None,
            layer_parallel.plan_table(num_layers),
        )
        self.statistics = DraftStatistics(device, self.num_speculative_steps)
        self.current_step = torch.zeros((), dtype=torch.int64, device=device)
        self.lookahead_file: LookaheadFile | None = None
        self.all_have_room = True  # the host knows that no context fills up in this round
        self.graphs_test_room = False  # draft graphs serve requests beyond the drafter's context too
        self.graphs: DraftGraphs | None = None  # vLLM drops it around memory profiling
        # vLLM's tokens of each request, `[max reqs, positions] int32` by request state row; the worker hands them over.
        self.token_ids: torch.Tensor
        self.pages: PagedKV
        self.loop: DraftLoop
        self.unread: UnreadBlocks

    # ---- one round ----

    @torch.inference_mode()
    def propose(  # noqa: PLR0913 - vLLM's interface
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft tokens `[reqs, K] int64`, the same bits on every rank. Arguments as in `BaseSpeculator.propose`."""
        if dummy_run and skip_attn_for_dummy_run:
            return self._profile(input_batch)
        self._take_up_pages()
        asked = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        batch = DraftBatch.from_vllm(
            input_batch,
            num_rejected,
            num_sampled,
            last_sampled,
            self.loop.block_table[: input_batch.num_reqs],
            min(asked, self.drafting.num_drafts),
            dummy_run,
        )
        self._copy_request_inputs(batch.num_reqs, batch.idx_mapping, temperature, seeds, dummy_run)
        if dummy_run:
            return self._round(batch)
        clock = self.statistics.clock
        clock.stop("verify")
        # Only vLLM's table says K = 0: a batch size where speculation does not pay.
        pause = batch.num_drafts == 0 and self.may_pause and self.drafting.calibration == "every_round"
        self._count(input_batch, batch, pause)
        if pause:
            self.unread.pause(batch)
            return self.draft_tokens[: batch.num_reqs].fill_(FILLER)
        clock.start("calibrate")
        if self.unread.any:
            self._catch_up(batch, input_batch.req_ids)
        drafts = self._round(batch)
        clock.stop("draft")
        if self.options.check_ranks:
            self._check_ranks(batch, drafts)
        return drafts

    def _round(self, batch: DraftBatch) -> torch.Tensor:
        clock, stages = self.statistics.clock, self.statistics.stages
        reqs, num_drafts = batch.num_reqs, batch.num_drafts
        plan, scope = self.drafting.choice(reqs)
        self.all_have_room = int(batch.seq_lens_bound.max()) + 1 + self.num_speculative_steps < self.max_draft_len

        if graph := self._calibration_graph(batch):
            self.loop.load(batch, graph)
            self._replay(graph)
        else:
            self.model.counters = stages["calibrate"]
            ablation = (plan, scope) if self.drafting.calibration == "never" else None
            self.loop.calibrate(batch, ablation)
        clock.stop("calibrate")

        clock.start("draft")
        if graph := self._draft_graph(batch, plan, scope):
            self._replay(graph)
        elif num_drafts > 1:
            self.model.counters = stages["draft"]
            max_seq_len = int(batch.seq_lens_bound.max()) + 1 + self.num_speculative_steps
            self.loop.draft(reqs, num_drafts, plan, scope, max_seq_len, self.drafting.lookahead)
        self.draft_tokens[:reqs, num_drafts:] = FILLER
        lowered = num_drafts == self.drafting.num_drafts < self.num_speculative_steps  # by `configure`
        if self.draft_logits is not None and lowered and not batch.dummy:
            # Not before, and in these rows only: drafts on their way are tested against the logits they came from.
            self.draft_logits[batch.idx_mapping, num_drafts:] = self.filler_logits
        return self.draft_tokens[:reqs]

    def _catch_up(self, batch: DraftBatch, req_ids: list[str]) -> None:
        """Read what paused rounds left unread, as far as it fits in one round."""
        spans = self.unread.spans_to_read(batch, req_ids, self.vllm_config.scheduler_config.max_num_batched_tokens)
        if spans:
            self.model.counters = self.statistics.stages["calibrate"]
            self.unread.have_read(self.loop.catch_up(batch, spans, self.token_ids))
            self.statistics.caught_up_tokens += sum(span.end - span.begin for span in spans)

    def _sample(self, index: int, hidden: torch.Tensor, positions: torch.Tensor, reqs: int) -> None:
        """Draft `index` of each request, from the hidden state at `positions`; logits are kept if it is sampled."""
        self.current_step.fill_(index)
        rows = self.idx_mapping[:reqs]
        sampled = self.sample_draft(
            hidden, positions, rows, self.temperature, self.seeds, self.current_step, self.draft_logits
        )
        if self.all_have_room:
            self.draft_tokens[:reqs, index] = sampled
            return
        has_room = positions < self.max_draft_len
        self.draft_tokens[:reqs, index] = torch.where(has_room, sampled, FILLER)
        if self.draft_logits is not None:
            # The rejection sampler must test the filler against the distribution that it came from: all on itself.
            logits = self.draft_logits[rows, index]
            self.draft_logits[rows, index] = torch.where(has_room.unsqueeze(1), logits, self.filler_logits)

    # ---- graphs ----

    def _replay(self, graph: DraftGraph) -> None:
        assert self.graphs is not None
        self.statistics.stages[graph.stage].add(self.graphs.replay(graph))
        self.statistics.replays += 1

    def _calibration_graph(self, batch: DraftBatch) -> DraftGraph | None:
        """The graph for this batch: all requests decode, each with as many tokens, and are to draft."""
        read = int(batch.query_lens[0])
        if batch.prefilling.any() or (batch.query_lens != read).any() or self.drafting.calibration == "never":
            return None
        return self._captured(batch, lambda rows: DraftGraph.calibrate(rows, read)) if batch.num_drafts else None

    def _draft_graph(self, batch: DraftBatch, plan: LayerPlan, scope: Scope) -> DraftGraph | None:
        if batch.num_drafts < 2:
            return None
        graph = self._captured(
            batch, lambda rows: DraftGraph.draft(rows, batch.num_drafts, plan, scope, self.drafting.lookahead)
        )
        if graph is None and not batch.dummy:
            self.statistics.eager_rounds += 1
            if self.graphs is not None and self.graphs.graphs:
                logger.info_once(
                    "easyspec: a round of %d requests drafts without CUDA graphs: more requests than the largest "
                    "captured size, a context about to fill up, or a plan that was not captured.",
                    batch.num_reqs,
                )
        return graph

    def _captured(self, batch: DraftBatch, describe: Callable[[int], DraftGraph]) -> DraftGraph | None:
        if self.graphs is None or batch.dummy:
            return None
        graph = describe(self.graphs.padded(batch.num_reqs))
        has_room = self.all_have_room or (graph.stage == "draft" and self.graphs_test_room)
        return graph if has_room and graph in self.graphs.graphs else None

    def _graphs_to_capture(self, sizes: Collection[int], drafts: Collection[int]) -> list[DraftGraph]:
        assert self.graphs is not None
        wanted: dict[DraftGraph, None] = {}
        for size, num_drafts in itertools.product(sizes, drafts):
            if size * (num_drafts + 1) <= self.graphs.max_tokens:
                wanted[DraftGraph.calibrate(size, num_drafts + 1)] = None
            if num_drafts > 1:
                for reqs in self.graphs.padded_to(size):
                    choice = self.drafting.choice(reqs)
                    wanted[DraftGraph.draft(size, num_drafts, *choice, self.drafting.lookahead)] = None
        return list(wanted)

    def _possible_drafts(self) -> list[int]:
        """Every K that a round may have."""
        spec = self.speculative_config
        if not spec.uses_dynamic_speculative_decoding():
            return [self.num_speculative_steps]
        schedule = build_dynamic_sd_schedule_lookup(
            spec.num_speculative_tokens_per_batch_size,
            vllm_max_batch_size=self.max_num_reqs,
            vllm_num_speculative_tokens=self.num_speculative_steps,
        )
        return sorted(set(schedule[1:]))

    # ---- counting ----

    def _count(self, input_batch: InputBatch, batch: DraftBatch, paused: bool) -> None:
        drafts = input_batch.num_draft_tokens_per_req
        tested = np.zeros(batch.num_reqs, dtype=bool) if drafts is None else drafts[: batch.num_reqs] > 0
        self.statistics.count_round(batch, tested, paused)
        self.statistics.rounds_by_plan[batch.num_drafts, *self.drafting.choice(batch.num_reqs)] += 1

    def _check_ranks(self, batch: DraftBatch, drafts: torch.Tensor) -> None:
        """Debug: every rank feeds its own drafts to the target, so ids and logits must agree to the bit."""
        _assert_same_on_ranks("draft ids", drafts)
        if self.draft_logits is not None:
            _assert_same_on_ranks("draft logits", self.draft_logits[batch.idx_mapping, : batch.num_drafts])

    # ---- swapping the plan ----

    def configure(
        self,
        scope: str | None = None,
        group_sizes: list[int] | None = None,
        num_drafts: int | None = None,
        calibration: str | None = None,
        lookahead: bool | None = None,
        restore: bool = False,
    ) -> None:
        """Swap what is given, from the next round on. Raises ValueError for what the drafter can't do.

        A scope or a plan holds for all batch sizes, whatever `by_batch_size` says; restore: first take up the
        configuration again.
        """
        changes: dict[str, Any] = {}
        if scope is not None or group_sizes is not None:
            changes["by_batch_size"] = ()
        if scope is not None:
            changes["scope"] = one_of("scope", scope, SCOPES)
        if calibration is not None:
            changes["calibration"] = one_of("calibration", calibration, get_args(Calibration))
        if group_sizes is not None:
            changes["plan"] = LayerPlan.of_sizes(self.precise.num_layers, group_sizes)
        if num_drafts is not None:
            one_of("num_speculative_tokens", num_drafts, range(1, self.num_speculative_steps + 1))
            changes["num_drafts"] = num_drafts
        if lookahead is not None:
            one_of("lookahead", lookahead, (False, True) if self.lookahead_file else (False,))
            changes["lookahead"] = lookahead
        drafting = dataclasses.replace(self.configured if restore else self.drafting, **changes)
        if drafting.lookahead and self.lookahead_file is not None:
            for plan in drafting.plans:
                self.lookahead_file.check_plan(plan)
        self.drafting = drafting
        self.statistics.reset()

    # ---- set-up, in the order in which vLLM calls it ----

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        spec = self.speculative_config
        model_config = copy.copy(self.draft_model_config)
        model_config.hf_config = copy.deepcopy(model_config.hf_config)
        # vLLM picks the class by the first name that it knows; the drafter reads its family from the rest.
        model_config.hf_config.architectures = [DRAFTER_ARCHITECTURE, *model_config.hf_config.architectures]
        parallel_config = replace(spec.draft_parallel_config, rank=self.vllm_config.parallel_config.rank)
        config = replace(
            self.vllm_config, model_config=model_config, quant_config=None, parallel_config=parallel_config
        )
        self.draft_vllm_config = choose_attention(spec.apply_draft_overrides(config), self.options.grouped_attention)
        model = get_model(vllm_config=self.draft_vllm_config, prefix="draft_model", load_config=spec.draft_load_config)
        for layer in model.attention:
            check_attention_backend(layer.attn_backend.get_name(), self.options.grouped_attention)
        if self.options.lookahead is not None:
            self._load_lookahead(model, self.options.lookahead)
        choose_products(model)
        return model

    def _load_lookahead(self, model: LayerParallelDrafter, path: str) -> None:
        draft = self.draft_model_config
        folder = checkpoint_folder(draft.model, draft.revision)
        if folder is None:
            raise ConfigError(f"lookahead={path!r}: the files of model={draft.model!r} are not on this machine")
        self.lookahead_file = LookaheadFile.read(path)
        self.lookahead_file.check_drafter(folder, model.shape)
        for plan in self.drafting.plans:
            self.lookahead_file.check_plan(plan)
        model.lookahead = LookaheadMaps.load(self.lookahead_file, model.placement, model.rank, model.final_norm)

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """For the virtual batch's metadata builders: whole heads, and a sequence for each layer of a request."""
        layers = max(1, len(self.model.local_layers))
        config = copy.copy(self.draft_vllm_config)
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.max_num_seqs = self.max_num_reqs * layers
        # Beyond this many tokens FlashAttention 3 chooses its splits by heuristics that a graph can't hold. `PagedKV`
        # takes the allowance back from calibration's longer passes, which are not captured.
        compilation = config.compilation_config = copy.copy(config.compilation_config)
        if compilation.max_cudagraph_capture_size:
            compilation.max_cudagraph_capture_size *= layers
        return config

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        support = self.attn_cg_support
        reason = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            reason = f"vLLM's cudagraph_mode is {cudagraph_mode.name}"
        elif is_chosen(self.draft_vllm_config):
            reason = "xformers' metadata is copied from the host"
        elif support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
            reason = f"the attention backend {support.min_cg_attn_backend} can't be captured for it"
        elif not self.supports_decode_metadata_update:
            reason = "the attention backend can't refresh its metadata on the device"
        # A rank without a drafter layer has no backend that could object; captures hold collectives, so all or none.
        reasons: list[str | None] = [None] * get_tp_group().world_size
        torch.distributed.all_gather_object(reasons, reason, group=get_tp_group().cpu_group)
        objection = next(filter(None, reasons), None)
        self.graphs = None
        if objection is None:
            self.graphs = DraftGraphs(self.vllm_config, self.device, CUDAGraphMode.FULL_DECODE_ONLY)
        else:
            logger.info_once("easyspec: the drafter runs without CUDA graphs, since %s.", objection)

    def capture(self) -> None:
        if self.graphs is not None:
            self.capture_for(self.graphs.sizes, self._possible_drafts())

    def capture_for(self, batch_sizes: Collection[int], drafts: Collection[int]) -> None:
        """Record what is missing of the graphs for these batch sizes and these K."""
        if self.graphs is None:
            return
        self._take_up_pages()
        self.all_have_room = not self.graphs_test_room
        self.idx_mapping.fill_(-1)
        sizes = {self.graphs.padded(size) for size in batch_sizes} - {0}
        self.loop.record(self.graphs, self._graphs_to_capture(sizes, drafts))

    def bind_pages(self) -> None:
        """Take up the pages that vLLM has bound. Repeatable; raises ValueError for a layout that can't be used."""
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                f"the target needs {len(groups)} K/V cache groups (layers of several kinds); easyspec shares the "
                "target's block table and supports one. Use method: draft_model for this target"
            )
        self.cache_group = 0
        attention_groups = self.attn_groups[self.cache_group]
        if len(attention_groups) > 1:
            raise ValueError("the drafter's layers fall into several attention groups; they must share one backend")
        block_size = self.block_tables.block_sizes[self.cache_group]
        self.pages = PagedKV(
            [layer for layer in self.model.attention if isinstance(layer, DrafterAttention)],
            attention_groups[0] if attention_groups else None,
            self.kv_cache_config.num_blocks,
            block_size,
            self.vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.max_draft_len = min(self.draft_model_config.max_model_len, self.vllm_config.model_config.max_model_len)
        # Where the target's context is longer, a request may live beyond the drafter's; it must not slow the others.
        # With logits of drafts kept, rows that pad a graph would write over a request's.
        outlives = self.max_draft_len < self.vllm_config.model_config.max_model_len
        self.graphs_test_room = outlives and self.draft_logits is None
        self.loop = DraftLoop(
            self.model,
            self.pages,
            CalibrationScheduler(self.model.shape.vocab_size, self.max_draft_len, block_size, self.device),
            self.block_tables.input_block_tables[self.cache_group],
            self.draft_tokens,
            self._sample,
        )
        self.unread = UnreadBlocks(self.kv_cache_config.num_blocks, block_size, self.max_draft_len, self.device)
        self.may_pause = 0 in self._possible_drafts()
        if self.draft_logits is not None:
            self.filler_logits = torch.full_like(self.draft_logits[0, 0], torch.finfo(self.draft_logits.dtype).min)
            self.filler_logits[FILLER] = 0

    def _take_up_pages(self) -> None:
        """On CUDA vLLM profiles with a throwaway cache before it binds the real one."""
        if not hasattr(self, "pages") or not self.pages.is_current():
            self.bind_pages()

    def describe(self) -> str:
        """This rank's plan, layers and memory, for the log."""
        model, pages = self.model, self.pages
        cache_bytes = sum(layer.kv_cache.nbytes for layer in pages.layers)
        maps = self.lookahead_file.describe() if self.lookahead_file else "none"
        table = "".join(
            f"{plan} ({scope} scope) {f'up to batch size {up_to}' if up_to else 'beyond'}, "
            for up_to, plan, scope in self.drafting.by_batch_size
        )
        return (
            f"rank {model.rank} of {model.num_ranks}: plan {table}{self.drafting.plan} ({self.drafting.scope} scope), "
            f"K={self.drafting.num_drafts}, look-ahead {maps}, attention and pages of layers "
            f"{list(model.local_layers)} here, MLPs: {model.mlp.value}, weights {model.weight_bytes():,} bytes, "
            f"K/V pages {cache_bytes:,} bytes ({cache_bytes // (pages.num_blocks * pages.block_size):,} a token)"
        )

    def _profile(self, input_batch: InputBatch) -> torch.Tensor:
        """vLLM's memory profiling, before pages exist: a whole batch through the precise pass, and its logits."""
        attention = UnpagedPass(input_batch.positions)
        hidden = self.model(input_batch.input_ids.long(), self.precise, "attention", attention)
        self.model.compute_logits(hidden[: input_batch.num_reqs])
        return self.draft_tokens[: input_batch.num_reqs]


def one_of(field: str, value: Any, allowed: Collection) -> Any:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(str, allowed))}")
    return value


def _assert_same_on_ranks(what: str, tensor: torch.Tensor) -> None:
    """Compare with rank 0's over the host. Raises RuntimeError on every rank that differs."""
    group = get_tp_group()
    mine = tensor.cpu().contiguous()
    first = mine.clone()
    torch.distributed.broadcast(first, src=group.ranks[0], group=group.cpu_group)
    if not torch.equal(first, mine):
        raise RuntimeError(
            f"{what} of tensor-parallel rank {group.rank_in_group} differ from rank 0's: {mine.tolist()} against "
            f"{first.tolist()}. Drafting would diverge; report this with the configuration"
        )
