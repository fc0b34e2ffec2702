"""`EasySpecSpeculator`: vLLM's speculator interface, and a round behind it: calibrate, draft; the target verifies."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_easyspec import last_words
from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.paged_kv import UnpagedPass
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.drafter.update import read_weights
from vllm_easyspec.graphs import DraftGraphs, open_graphs
from vllm_easyspec.lookahead import LookaheadFile
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.rank_check import assert_same_on_ranks
from vllm_easyspec.round_reports import RoundReporter
from vllm_easyspec.runtime import DrafterRuntime, build_runtime, draft_vllm_config, load_drafter, virtual_batch_config
from vllm_easyspec.settings import DraftSettings, LiveSettings, scheduled_num_drafts
from vllm_easyspec.watch import DraftWatch

logger = init_logger("vllm.easyspec")

# Proposed where the drafter can't draft (its context is full, or K was lowered at run time): any valid id will do,
# since the target tests it like every draft.
FILLER = 0


class EasySpecSpeculator(DraftModelSpeculator):
    """One rank's speculator. vLLM builds it, loads the drafter, binds pages, then asks for drafts every round."""

    # A prefilling request's calibration reads one token more than its step: the newest one.
    num_extra_query_per_req = 1
    model: LayerParallelDrafter
    draft_logits: torch.Tensor | None  # [max reqs, K, vocab], kept for the rejection sampler if drafts are sampled

    def __init__(self, vllm_config: VllmConfig, device: torch.device, token_ids: torch.Tensor):
        """token_ids: vLLM's tokens of each request, `[max reqs, positions] int32` by index of the request's state."""
        super().__init__(vllm_config, device)
        self.token_ids = token_ids
        self.options = RuntimeOptions.from_vllm(vllm_config)
        if self.draft_logits is not None and self.options.use_heterogeneous_vocab:
            # vLLM sized them by the drafter's vocabulary, and drafts are the target's tokens.
            size = vllm_config.model_config.get_vocab_size()
            self.draft_logits = self.draft_logits.new_zeros(*self.draft_logits.shape[:2], size)
        self.draft_vllm_config = draft_vllm_config(vllm_config, self.options)
        num_layers = self.draft_model_config.hf_config.num_hidden_layers
        self.precise = DraftPlan.precise(num_layers)
        self.lookahead_file = None if self.options.lookahead is None else LookaheadFile.read(self.options.lookahead)
        plans = self.options.layer_parallel.plan_table(num_layers)
        maps = self.lookahead_file is not None
        configured = DraftSettings(plans, self.num_speculative_steps, self.options.calibration, maps)
        self.settings = LiveSettings(configured, self.lookahead_file)
        self.scheduled_num_drafts = scheduled_num_drafts(vllm_config)
        self.statistics = DraftStatistics(device, self.num_speculative_steps)
        is_first = vllm_config.parallel_config.rank == 0
        self.watch = DraftWatch(device) if is_first else None
        self.reporter = RoundReporter(vllm_config.parallel_config.data_parallel_index) if is_first else None
        self.current_step = torch.zeros((), dtype=torch.int64, device=device)
        self.filler_logits: torch.Tensor | None = None  # one-hot at the filler
        if self.draft_logits is not None:
            self.filler_logits = torch.full_like(self.draft_logits[0, 0], torch.finfo(self.draft_logits.dtype).min)
            self.filler_logits[FILLER] = 0
        self.graphs: DraftGraphs | None = None  # vLLM drops it around memory profiling, and expects it under this name
        self.bound: DrafterRuntime | None = None  # for the pages that vLLM bound last

    # ---- one round ----

    @torch.inference_mode()
    def propose(
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
        scheduled = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        batch = DraftBatch.from_vllm(
            input_batch,
            num_rejected,
            num_sampled,
            last_sampled,
            self.runtime.loop.block_table[: input_batch.num_reqs],
            min(scheduled, self.settings.current.num_drafts),
            dummy_run,
        )
        self._copy_request_inputs(batch.num_reqs, batch.idx_mapping, temperature, seeds, dummy_run)
        return self._round(batch, input_batch)

    def _round(self, batch: DraftBatch, input_batch: InputBatch) -> torch.Tensor:
        runtime, settings, clock = self.runtime, self.settings.current, self.statistics.clock
        if not batch.dummy:
            clock.stop("verify")
            self._count(batch, input_batch)
        if self._is_paused(batch):
            runtime.uncalibrated.mark(batch)
            return self.draft_tokens[: batch.num_reqs].fill_(FILLER)

        clock.start("calibrate")
        if runtime.uncalibrated.any and not batch.dummy:
            budget = self.scheduler_config.max_num_batched_tokens
            runtime.catch_up(batch, input_batch.req_ids, budget, self.token_ids)
        runtime.calibrate(batch, settings)
        clock.stop("calibrate")

        clock.start("draft")
        runtime.draft(batch, settings)
        drafts = self._filled_up(batch)
        clock.stop("draft")

        if self.watch is not None and not batch.dummy:
            hidden = runtime.loop.newest[: batch.num_reqs]
            self.statistics.warnings += self.watch.after_round(self.statistics.by_kept_tokens, hidden)
        if self.options.check_ranks and not batch.dummy:
            self._check_ranks(batch, drafts)
        return drafts  # verify: the target reads them in the next step, and vLLM's rejection sampler decides

    def _is_paused(self, batch: DraftBatch) -> bool:
        """Whether vLLM's table of K by batch size says 0: speculation does not pay off at this batch size."""
        calibrates = self.settings.current.calibration == "every_round"
        return batch.num_drafts == 0 and 0 in self.scheduled_num_drafts and calibrates and not batch.dummy

    def _sample(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, num_reqs: int, test_room: bool
    ) -> None:
        """Draft `index` of each request, from the hidden state at `positions`; logits are kept if it is sampled."""
        self.current_step.fill_(index)
        states = self.idx_mapping[:num_reqs]
        sampled = self.sample_draft(
            hidden, positions, states, self.temperature, self.seeds, self.current_step, self.draft_logits
        )
        if not test_room:
            self.draft_tokens[:num_reqs, index] = sampled
            return
        has_room = positions < self.runtime.bounds.max_len
        self.draft_tokens[:num_reqs, index] = torch.where(has_room, sampled, FILLER)
        if self.enable_adaptive_verification:
            self.draft_token_confidence_probs[:num_reqs, index] *= has_room
        if self.draft_logits is not None and self.filler_logits is not None:
            # The rejection sampler must test the filler against its own distribution, which is one-hot.
            logits = self.draft_logits[states, index]
            self.draft_logits[states, index] = torch.where(has_room.unsqueeze(1), logits, self.filler_logits)

    def _filled_up(self, batch: DraftBatch) -> torch.Tensor:
        """The round's drafts, with fillers after its K."""
        num_drafts = batch.num_drafts
        self.draft_tokens[: batch.num_reqs, num_drafts:] = FILLER
        if self.enable_adaptive_verification:
            self.draft_token_confidence_probs[: batch.num_reqs, num_drafts:] = 0
        lowered = num_drafts == self.settings.current.num_drafts < self.num_speculative_steps  # by `easyspec_configure`
        if self.draft_logits is not None and self.filler_logits is not None and lowered and not batch.dummy:
            # Only now, and only for these requests: other drafts are yet to be tested against their own logits.
            self.draft_logits[batch.idx_mapping, num_drafts:] = self.filler_logits
        return self.draft_tokens[: batch.num_reqs]

    def _count(self, batch: DraftBatch, input_batch: InputBatch) -> None:
        drafts = input_batch.num_draft_tokens_per_req
        tested = np.zeros(batch.num_reqs, dtype=bool) if drafts is None else drafts[: batch.num_reqs] > 0
        self.statistics.count_round(batch, tested, self._is_paused(batch))
        self.statistics.rounds_by_plan[batch.num_drafts, self.settings.current.plans.at(batch.num_reqs)] += 1
        if self.reporter is not None:
            self.reporter.after_round(self.statistics)

    def _check_ranks(self, batch: DraftBatch, drafts: torch.Tensor) -> None:
        """Debug: every rank feeds its own drafts to the target, so ids and logits must agree to the bit."""
        assert_same_on_ranks("draft ids", drafts)
        if self.enable_adaptive_verification:
            assert_same_on_ranks("drafts' confidence", self.draft_token_confidence_probs[: batch.num_reqs])
        if self.draft_logits is not None:
            assert_same_on_ranks("draft logits", self.draft_logits[batch.idx_mapping, : batch.num_drafts])

    # ---- set-up, in the order of vLLM's calls ----

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        load_config = self.speculative_config.draft_load_config
        with last_words.leaving():
            return load_drafter(self.draft_vllm_config, self.options, load_config, self.lookahead_file)

    def read_again(self, model: str | None = None) -> None:
        """Load look-ahead maps, and the weights of the checkpoint `model` or those of the start. Raises as
        `replace_weights` does."""
        if self.lookahead_file is not None:
            self.model.read_maps(self.lookahead_file)
        config = copy.copy(self.draft_vllm_config.model_config)
        if model is not None:
            config.model, config.revision, config.code_revision = model, None, None
        load_config = self.speculative_config.draft_load_config or self.vllm_config.load_config
        self.replace_weights(read_weights(config, load_config, self.model.shape), are_of_start=model is None)

    def replace_weights(self, weights: Iterable[tuple[str, torch.Tensor]], are_of_start: bool = False) -> None:
        """As `LayerParallelDrafter.replace_weights`. What the old weights wrote is read again when it is used."""
        self.model.replace_weights(weights)
        self.runtime.uncalibrated.mark_all()
        logger.info("easyspec: the drafter has %s weights.", "its first" if are_of_start else "new")
        if self.lookahead_file is not None and not are_of_start:
            logger.warning(
                "easyspec: the look-ahead maps of %s were fitted on the weights of the start. If fewer drafts are "
                "accepted now, fit them again, or switch them off: easyspec_configure(lookahead=False)",
                self.lookahead_file.path,
            )

    @property
    def attn_vllm_config(self) -> VllmConfig:
        return virtual_batch_config(self.draft_vllm_config, self.model)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = open_graphs(
            self.vllm_config,
            self.draft_vllm_config,
            self.device,
            cudagraph_mode,
            self.attn_cg_support,
            self.supports_decode_metadata_update,
        )

    @property
    def runtime(self) -> DrafterRuntime:
        """For the pages that vLLM has bound: on CUDA it profiles with a temporary cache before it binds the real one.

        Raises ValueError for pages that can't be used.
        """
        if self.bound is None or not self.bound.is_current() or self.bound.graphs is not self.graphs:
            groups = self.kv_cache_config.kv_cache_groups
            if len(groups) != 1:
                raise ValueError(
                    f"the target needs {len(groups)} K/V cache groups (layers of several kinds); easyspec shares the "
                    "target's block table and supports one. Use method: draft_model for this target"
                )
            self.bound = build_runtime(
                self.vllm_config,
                self.model,
                self.attn_groups[0],
                self.kv_cache_config.num_blocks,
                self.block_tables.block_sizes[0],
                self.block_tables.input_block_tables[0],
                self.draft_tokens,
                self._sample,
                self.statistics,
                self.graphs,
                self.draft_logits is not None,
            )
        return self.bound

    def capture(self) -> None:
        if self.graphs is not None:
            self.capture_for(self.graphs.sizes, self.scheduled_num_drafts)

    def capture_for(self, batch_sizes: list[int], num_drafts: list[int]) -> None:
        """Record the graphs for these batch sizes and these K that are not recorded yet."""
        self.idx_mapping.fill_(-1)
        self.runtime.capture(batch_sizes, num_drafts, self.settings.current)

    def _profile(self, input_batch: InputBatch) -> torch.Tensor:
        """For vLLM's memory profiling, before pages exist: the precise pass over a whole batch, and its logits."""
        hidden = self.model(input_batch.input_ids.long(), self.precise, UnpagedPass(input_batch.positions))
        self.model.compute_logits(hidden[: input_batch.num_reqs])
        return self.draft_tokens[: input_batch.num_reqs]
