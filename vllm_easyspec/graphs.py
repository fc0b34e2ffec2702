"""CUDA graphs of the passes of a round, captured and kept by vLLM's own manager."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_easyspec.drafter.plan import LayerPlan, Scope
from vllm_easyspec.metrics import PassCounters

Stage = Literal["calibrate", "draft"]


@dataclass(frozen=True)
class DraftGraph(BatchExecutionDescriptor):
    """What one graph holds: a stage of a round for `num_reqs` requests, padding included."""

    stage: Stage = "draft"
    read: int = 1  # calibrate: rows a request
    num_drafts: int = 1  # draft: K of the round; calibrate: 1, the first draft
    plan: LayerPlan | None = None  # draft
    scope: Scope | None = None  # draft
    lookahead: bool = False  # draft

    @classmethod
    def calibrate(cls, num_reqs: int, read: int) -> "DraftGraph":
        return cls(CUDAGraphMode.FULL, num_tokens=num_reqs * read, num_reqs=num_reqs, stage="calibrate", read=read)

    @classmethod
    def draft(
        cls, num_reqs: int, num_drafts: int, plan: LayerPlan, scope: Scope, lookahead: bool = False
    ) -> "DraftGraph":
        return cls(
            CUDAGraphMode.FULL,
            num_tokens=num_reqs,
            num_reqs=num_reqs,
            num_drafts=num_drafts,
            plan=plan,
            scope="attention" if plan.is_precise else scope,
            lookahead=lookahead and not plan.is_precise,
        )


class DraftGraphs(CudaGraphManager):
    """Graphs for vLLM's capture sizes, as numbers of requests, and for a full batch.

    vLLM drops and remakes it around memory profiling.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, mode: CUDAGraphMode):
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        sizes = {desc.num_reqs or 0 for desc in self._capture_descs.get(CUDAGraphMode.FULL, [])}
        self.max_tokens = self.compilation_config.max_cudagraph_capture_size or 0
        # vLLM's sizes are a grid of tokens; a full batch is the one that most needs a graph.
        self.sizes = sorted(sizes | {min(self.max_num_reqs, self.max_tokens)}) if sizes else []
        self.counters: dict[BatchExecutionDescriptor, PassCounters] = {}

    def padded(self, num_reqs: int) -> int:
        """The capture size for `num_reqs` requests; 0 where there is none."""
        return next((size for size in self.sizes if size >= num_reqs), 0)

    def padded_to(self, size: int) -> range:
        """The numbers of requests that take this capture size."""
        return range(max((smaller for smaller in self.sizes if smaller < size), default=0) + 1, size + 1)

    def record(self, wanted: Iterable[DraftGraph], run: Callable[[DraftGraph], PassCounters]) -> None:
        """Capture what is not captured yet. run: the graph's passes; returns what they counted."""
        missing = [graph for graph in wanted if graph not in self.graphs]
        if not missing:
            return

        def create_forward_fn(graph: DraftGraph, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            def forward(_mode: CUDAGraphMode) -> None:
                self.counters[graph] = run(graph)

            return forward

        # Largest first, so that the smaller ones fit into the memory pool that it makes.
        missing.sort(key=lambda graph: graph.num_tokens, reverse=True)
        self._capture_descs = {CUDAGraphMode.FULL: missing}  # type: ignore[dict-item]
        self.capture(create_forward_fn, "Capturing the drafter's CUDA graphs")  # type: ignore[arg-type]

    def replay(self, graph: DraftGraph) -> PassCounters:
        """Returns what the graph's passes count."""
        self.run_fullgraph(graph)
        return self.counters[graph]
