"""CUDA graphs without CUDA: what runs under `torch.cuda.graph` is recorded, and replayed on the same memory.

Like a real graph, a replay runs no Python of the recorded function: every operator and Triton kernel runs again on the
tensors that it had, so a value that came from the host is that of the recording. `use` makes vLLM's
`CudaGraphManager` use it.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from vllm.v1.worker.gpu import cudagraph_utils


class RecordedGraph:
    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def replay(self) -> None:
        for step in self.steps:
            step()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the recorded function waits for a number of the device")
        held = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        fresh = [(i, leaf) for i, leaf in enumerate(_tensors(out)) if leaf.untyped_storage().data_ptr() not in held]

        def step() -> None:
            again = operator(*args, **kwargs)
            for work in tree_leaves(again):
                if isinstance(work, torch.ScriptObject):  # of a collective by gloo, on CPUs without AVX-512
                    work.wait()
            for index, tensor in fresh:
                tensor.copy_(_tensors(again)[index])

        self.graph.steps.append(step)
        return out


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _record(graph: RecordedGraph, *_, **__):
    launch = InterpretedFunction.run

    def run(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)
        graph.steps.append(lambda: launch(self, *args, **kwargs))

    InterpretedFunction.run = run
    try:
        with _Recorder(graph):
            yield
    finally:
        InterpretedFunction.run = launch


def use() -> None:
    """For the rest of this process."""
    torch.cuda.CUDAGraph = RecordedGraph
    torch.cuda.graph = _record
    cudagraph_utils.graph_capture = lambda device: nullcontext()
    cudagraph_utils.capture_pool = lambda pool, config: nullcontext()
    cudagraph_utils.current_stream = lambda: None
    type(cudagraph_utils.current_platform).get_global_graph_pool = lambda self: None
