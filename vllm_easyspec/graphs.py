"""CUDA graphs of a round's passes, in a manager derived from vLLM's: what to capture, and which graph fits a round."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import AttentionCGSupportInfo
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_easyspec.batch import DraftBatch, DraftBounds
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.drafter.xformers_attention import is_chosen as is_xformers
from vllm_easyspec.metrics import PassCounters
from vllm_easyspec.rank_check import first_problem
from vllm_easyspec.settings import DraftSettings

logger = init_logger("vllm.easyspec")

Stage = Literal["calibrate", "draft"]


@dataclass(frozen=True)
class DraftGraph(BatchExecutionDescriptor):
    """Identifies a graph: a stage of a round for `num_reqs` requests, padding included."""

    stage: Stage = "draft"
    query_len: int = 1  # calibrate: tokens per request that the target read
    num_drafts: int = 1  # draft: K of the round; calibrate: 1
    plan: DraftPlan | None = None  # draft
    lookahead: bool = False  # draft

    @classmethod
    def calibrate(cls, num_reqs: int, query_len: int) -> "DraftGraph":
        """The calibration of `num_reqs` decoding requests of `query_len` tokens each."""
        tokens = num_reqs * query_len
        return cls(CUDAGraphMode.FULL, num_tokens=tokens, num_reqs=num_reqs, stage="calibrate", query_len=query_len)

    @classmethod
    def draft(cls, num_reqs: int, num_drafts: int, plan: DraftPlan, lookahead: bool = False) -> "DraftGraph":
        """The fuzzy steps of `num_reqs` requests: drafts 2 to `num_drafts`."""
        return cls(
            CUDAGraphMode.FULL,
            num_tokens=num_reqs,
            num_reqs=num_reqs,
            num_drafts=num_drafts,
            plan=plan,
            lookahead=lookahead and not plan.is_precise,
        )


class DraftGraphs(CudaGraphManager):
    """Graphs for vLLM's capture sizes, as numbers of requests, and for a full batch.

    vLLM drops it after memory profiling and makes another.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, mode: CUDAGraphMode):
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        sizes = {desc.num_reqs or 0 for desc in self._capture_descs.get(CUDAGraphMode.FULL, [])}
        self.max_tokens = self.compilation_config.max_cudagraph_capture_size or 0
        # vLLM's sizes are numbers of tokens and may miss the full batch, which needs a graph most.
        self.sizes = sorted(sizes | {min(self.max_num_reqs, self.max_tokens)}) if sizes else []
        self.counters: dict[BatchExecutionDescriptor, PassCounters] = {}

    # ---- which graph fits ----

    def padded(self, num_reqs: int) -> int:
        """The capture size for `num_reqs` requests; 0 where there is none."""
        return next((size for size in self.sizes if size >= num_reqs), 0)

    def padded_to(self, size: int) -> range:
        """The numbers of requests that are padded to this capture size."""
        return range(max((smaller for smaller in self.sizes if smaller < size), default=0) + 1, size + 1)

    def for_calibration(self, batch: DraftBatch, settings: DraftSettings, bounds: DraftBounds) -> DraftGraph | None:
        """The captured graph for a batch whose requests all decode, each with the same number of tokens, and draft."""
        query_len = int(batch.query_lens[0])
        is_uniform = not batch.prefilling.any() and (batch.query_lens == query_len).all()
        if not is_uniform or batch.num_drafts == 0 or settings.calibration == "never" or not bounds.has_room(batch):
            return None
        return self._captured(batch, DraftGraph.calibrate(self.padded(batch.num_reqs), query_len))

    def for_drafting(self, batch: DraftBatch, settings: DraftSettings, bounds: DraftBounds) -> DraftGraph | None:
        """The captured graph for the batch's fuzzy steps."""
        if not bounds.has_room(batch) and not bounds.graphs_test_room:
            return None
        size, plan = self.padded(batch.num_reqs), settings.plans.at(batch.num_reqs)
        return self._captured(batch, DraftGraph.draft(size, batch.num_drafts, plan, settings.lookahead))

    def _captured(self, batch: DraftBatch, graph: DraftGraph) -> DraftGraph | None:
        return graph if graph in self.graphs and not batch.dummy else None

    def wanted(
        self, batch_sizes: Collection[int], num_drafts: Collection[int], settings: DraftSettings
    ) -> list[DraftGraph]:
        """The graphs that rounds of these batch sizes and these K may need."""
        wanted: dict[DraftGraph, None] = {}
        sizes = {self.padded(size) for size in batch_sizes} - {0}
        for size, k in product(sizes, num_drafts):
            if size * (k + 1) <= self.max_tokens:
                wanted[DraftGraph.calibrate(size, k + 1)] = None
            if k > 1:
                for plan in dict.fromkeys(map(settings.plans.at, self.padded_to(size))):
                    wanted[DraftGraph.draft(size, k, plan, settings.lookahead)] = None
        return list(wanted)

    # ---- capture and replay ----

    def record(self, wanted: Iterable[DraftGraph], run: Callable[[DraftGraph], PassCounters]) -> None:
        """Capture what is not captured yet. run: runs a graph's passes and returns their counts."""
        missing = [graph for graph in wanted if graph not in self.graphs]
        if not missing:
            return

        def create_forward_fn(graph: DraftGraph, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            def forward(_mode: CUDAGraphMode) -> None:
                self.counters[graph] = run(graph)

            return forward

        # Largest first, so that the smaller ones fit into its memory pool.
        missing.sort(key=lambda graph: graph.num_tokens, reverse=True)
        self._capture_descs = {CUDAGraphMode.FULL: missing}
        self.capture(create_forward_fn, "Capturing the drafter's CUDA graphs")

    def replay(self, graph: DraftGraph) -> PassCounters:
        """Run the graph. Returns the counts of its passes."""
        self.run_fullgraph(graph)
        return self.counters[graph]


def open_graphs(
    vllm_config: VllmConfig,
    draft_vllm_config: VllmConfig,
    device: torch.device,
    target_mode: CUDAGraphMode,
    support: AttentionCGSupportInfo,
    refreshes_metadata: bool,
) -> DraftGraphs | None:
    """An empty manager, or None where some rank's drafter can't be captured. All ranks must call it together.

    target_mode: mode of the target's graphs; support: what this rank's attention backend supports; refreshes_metadata:
    whether that backend can refresh its metadata on the device.
    """
    reason = None
    if target_mode.decode_mode() != CUDAGraphMode.FULL:
        reason = f"vLLM's cudagraph_mode is {target_mode.name}"
    elif is_xformers(draft_vllm_config):
        reason = "xformers' metadata is copied from the host"
    elif support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
        reason = f"the attention backend {support.min_cg_attn_backend} can't be captured for it"
    elif not refreshes_metadata:
        reason = "the attention backend can't refresh its metadata on the device"
    # Graphs contain collectives, so all ranks capture or none; a rank without a drafter layer has no backend to ask.
    objection = first_problem(reason)
    if objection is None:
        return DraftGraphs(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY)
    logger.info_once("easyspec: the drafter runs without CUDA graphs, since %s.", objection)
    return None
