"""`DrafterRuntime`: one rank's drafter with its K/V pages, in an engine or without one.

It is built in vLLM's order: `draft_vllm_config` and `load_drafter`; then vLLM lays out and binds the K/V pages, with
metadata builders made for `virtual_batch_config`; then `build_runtime`, again whenever vLLM binds other pages.
"""

import copy
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig, replace
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.utils import AttentionGroup

from vllm_easyspec.batch import DraftBatch, DraftBounds
from vllm_easyspec.calibration import CalibrationScheduler
from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.paged_kv import DrafterAttention, PagedKV
from vllm_easyspec.drafter.xformers_attention import choose as choose_attention
from vllm_easyspec.drafting import DraftLoop, Sample
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.graphs import DraftGraph, DraftGraphs
from vllm_easyspec.lookahead import LookaheadFile, checkpoint_folder
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.ops import warn_without
from vllm_easyspec.plugin import DRAFTER_ARCHITECTURE
from vllm_easyspec.settings import DraftSettings, LiveSettings
from vllm_easyspec.support import check_attention_backend
from vllm_easyspec.uncalibrated import UncalibratedBlocks

logger = init_logger("vllm.easyspec")


class DrafterRuntime:
    """Runs the stages of a round, from a CUDA graph where one fits and eagerly otherwise."""

    def __init__(
        self,
        model: LayerParallelDrafter,
        pages: PagedKV,
        loop: DraftLoop,
        graphs: DraftGraphs | None,
        bounds: DraftBounds,
        statistics: DraftStatistics,
    ):
        self.model = model
        self.pages = pages
        self.loop = loop
        self.bounds = bounds
        self.statistics = statistics
        device = statistics.device
        self.uncalibrated = UncalibratedBlocks(pages.num_blocks, pages.block_size, bounds.max_len, device)
        # Weak: vLLM drops its graph managers after memory profiling to get their memory back.
        self._graphs = None if graphs is None else weakref.ref(graphs)

    @property
    def graphs(self) -> DraftGraphs | None:
        """The captured graphs; None without graphs, or once vLLM has dropped its manager."""
        return None if self._graphs is None else self._graphs()

    def is_current(self) -> bool:
        """Whether the pages are still those that vLLM has bound."""
        return self.pages.is_current()

    # ---- the stages ----

    def calibrate(self, batch: DraftBatch, settings: DraftSettings) -> None:
        """Make the K/V of the batch's new tokens precise, and draft token 1 of each request."""
        graph = self.graphs.for_calibration(batch, settings, self.bounds) if self.graphs else None
        if graph is not None:
            self.loop.load(batch, graph)
            self._replay(graph)
            return
        self.model.counters = self.statistics.stages["calibrate"]
        ablation = settings.plans.at(batch.num_reqs) if settings.calibration == "never" else None
        self.loop.calibrate(batch, not self.bounds.has_room(batch), ablation)

    def draft(self, batch: DraftBatch, settings: DraftSettings) -> None:
        """Draft tokens 2 to K of each request, after `calibrate`."""
        if batch.num_drafts < 2:
            return
        graph = self.graphs.for_drafting(batch, settings, self.bounds) if self.graphs else None
        if graph is not None:
            self._replay(graph)
            return
        if not batch.dummy:
            self._count_eager_round(batch)
        self.model.counters = self.statistics.stages["draft"]
        self.loop.draft(
            batch.num_reqs,
            batch.num_drafts,
            settings.plans.at(batch.num_reqs),
            self.bounds.max_seq_len(batch),
            settings.lookahead,
            not self.bounds.has_room(batch),
        )

    def catch_up(self, batch: DraftBatch, req_ids: Sequence[str], budget: int, token_ids: torch.Tensor) -> None:
        """Calibrate what paused rounds left uncalibrated, up to about `budget` tokens.

        token_ids: `[max reqs, positions] int32`, by index in vLLM's request state.
        """
        spans = self.uncalibrated.spans_to_calibrate(batch, req_ids, budget)
        if spans:
            self.model.counters = self.statistics.stages["calibrate"]
            self.uncalibrated.mark_calibrated(self.loop.catch_up(batch, spans, token_ids))
            self.statistics.caught_up_tokens += sum(span.end - span.begin for span in spans)

    # ---- graphs ----

    def capture(self, batch_sizes: Collection[int], num_drafts: Collection[int], settings: DraftSettings) -> None:
        """Record the graphs for these batch sizes and these K that are not recorded yet. Without graphs, do nothing."""
        if self.graphs is not None:
            wanted = self.graphs.wanted(batch_sizes, num_drafts, settings)
            self.loop.record(self.graphs, wanted, self.bounds.graphs_test_room)

    def _replay(self, graph: DraftGraph) -> None:
        assert self.graphs is not None
        self.statistics.stages[graph.stage].add(self.graphs.replay(graph))
        self.statistics.replays += 1

    def _count_eager_round(self, batch: DraftBatch) -> None:
        self.statistics.eager_rounds += 1
        if self.graphs is not None and self.graphs.graphs:
            logger.info_once(
                "easyspec: a round of %d requests drafts without CUDA graphs: more requests than the largest "
                "captured size, a context about to fill up, or a plan that was not captured.",
                batch.num_reqs,
            )

    def describe(self, settings: LiveSettings) -> str:
        """This rank's plans, layers and memory, for the log."""
        model, pages = self.model, self.pages
        cache_bytes = sum(layer.kv_cache.nbytes for layer in pages.layers)
        maps = settings.lookahead_file.describe() if settings.lookahead_file else "none"
        return (
            f"rank {model.rank} of {model.num_ranks}: plan {settings.current.plans}, K={settings.current.num_drafts}, "
            f"look-ahead {maps}, drafts from {model.head.describe()}, attention and pages of layers "
            f"{list(model.local_layers)} here, MLPs: {model.mlp.value}, weights {model.weight_bytes():,} bytes, "
            f"K/V pages {cache_bytes:,} bytes "
            f"({cache_bytes // (pages.num_blocks * pages.block_size):,} per token)"
        )


# ---- building one ----


def draft_vllm_config(config: VllmConfig, options: RuntimeOptions) -> VllmConfig:
    """The configuration that the drafter is built with.

    config: an engine's with a speculative configuration, or one whose model is the drafter itself. Raises `ConfigError`
    where no attention backend can take the drafter's layers.
    """
    spec = config.speculative_config
    model_config = copy.copy(config.model_config if spec is None else spec.draft_model_config)
    model_config.hf_config = copy.deepcopy(model_config.hf_config)
    # vLLM takes the first architecture that it knows; the drafter reads its family from the others.
    model_config.hf_config.architectures = [DRAFTER_ARCHITECTURE, *model_config.hf_config.architectures]
    model_config.quantization = None  # a quantized checkpoint is decompressed when it is loaded
    if spec is None:
        config = copy.copy(config)
        config.model_config, config.quant_config = model_config, None
    else:
        parallel_config = replace(spec.draft_parallel_config, rank=config.parallel_config.rank)
        changes = {"model_config": model_config, "parallel_config": parallel_config, "quant_config": None}
        config = spec.apply_draft_overrides(replace(config, **changes))
    return choose_attention(config, options.grouped_attention)


def load_drafter(
    config: VllmConfig, options: RuntimeOptions, load_config: Any = None, lookahead_file: LookaheadFile | None = None
) -> LayerParallelDrafter:
    """This rank's share of the drafter. config: of `draft_vllm_config`; load_config: vLLM's, where not `config`'s own.

    Raises `ConfigError` where the drafter can't use the attention backend that vLLM gave it, or maps aren't its own.
    """
    warn_without()
    model = get_model(vllm_config=config, prefix="draft_model", load_config=load_config)
    for layer in model.attention:
        check_attention_backend(layer.attn_backend.get_name(), options.grouped_attention)
    if lookahead_file is not None:
        name, revision = config.model_config.model, config.model_config.revision
        folder = checkpoint_folder(name, revision)
        if folder is None:
            path = lookahead_file.path
            raise ConfigError(f"lookahead={path!r}: the files of model={name!r} are not on this machine")
        lookahead_file.check_drafter(folder, model.shape)
        model.read_maps(lookahead_file)
    model.prepare_weights()
    return model


def virtual_batch_config(config: VllmConfig, model: LayerParallelDrafter) -> VllmConfig:
    """The configuration for the virtual batch's metadata builders: a sequence for each layer of a request."""
    layers = max(1, len(model.local_layers))
    config = copy.copy(config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs *= layers
    # Beyond this many tokens FlashAttention 3 chooses its splits by heuristics that a graph can't record. `PagedKV`
    # undoes this for calibration's longer passes, which are not captured.
    compilation = config.compilation_config = copy.copy(config.compilation_config)
    if compilation.max_cudagraph_capture_size:
        compilation.max_cudagraph_capture_size *= layers
    return config


def build_runtime(
    vllm_config: VllmConfig,
    model: LayerParallelDrafter,
    attention_groups: Sequence[AttentionGroup],
    num_blocks: int,
    block_size: int,
    block_table: torch.Tensor,
    draft_tokens: torch.Tensor,
    sample: Sample,
    statistics: DraftStatistics,
    graphs: DraftGraphs | None,
    keeps_logits: bool = False,
) -> DrafterRuntime:
    """The runtime for the pages that vLLM has bound.

    vllm_config: the engine's; attention_groups: of the drafter's layers here; num_blocks, block_size: of the K/V cache;
    block_table: `[max reqs, width] int32`, refilled by its owner; draft_tokens: `[max reqs, K] int64`, which
    `sample` fills; keeps_logits: `sample` keeps logits too. Raises ValueError for pages that can't be used.
    """
    if len(attention_groups) > 1:
        raise ValueError("the drafter's layers fall into several attention groups; they must share one backend")
    pages = PagedKV(
        [layer for layer in model.attention if isinstance(layer, DrafterAttention)],
        attention_groups[0] if attention_groups else None,
        num_blocks,
        block_size,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )
    # Read only now: vLLM may have fitted the target's length to the memory.
    target_len, spec = vllm_config.model_config.max_model_len, vllm_config.speculative_config
    max_len = min(target_len, spec.draft_model_config.max_model_len) if spec else target_len
    # Where logits of drafts are kept, requests that pad a graph would overwrite those of others.
    bounds = DraftBounds(draft_tokens.shape[1], max_len, max_len < target_len and not keeps_logits)
    calibration = CalibrationScheduler(model.vocab_size, max_len, block_size, draft_tokens.device)
    loop = DraftLoop(model, pages, calibration, block_table, draft_tokens, sample)
    return DrafterRuntime(model, pages, loop, graphs, bounds, statistics)
