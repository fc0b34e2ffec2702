"""Which product of few tokens a GPU takes: the project's own operators or torch's, measured where it serves.

On a CPU one way serves all sizes, packed weights in native operators, and nothing is measured.

Own operators read the weights with the norm in front of them and what follows in one launch; torch's need three to five
launches, each of which may read faster. What wins depends on the GPU, the widths and the number of tokens, so a second
at start decides: each operator goes through all of this rank's layers in a CUDA graph, both ways, one layer at a time
and four at once, as plans do. An operator whose result is not torch's, up to rounding, is not used, and a warning says
so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_easyspec import ops

logger = init_logger("vllm.easyspec")

TOKENS = (1, 2, 4, 8, 16)
GROUP = 4
REPLAYS = 5
# Of the largest number of a result: products of bfloat16 that are summed in other orders differ by less.
LARGEST_DIFFERENCE = 0.03


@dataclass(frozen=True)
class Measured:
    """Microseconds a layer of one operator, both ways."""

    operator: str
    at_once: int  # layers
    tokens: int
    own_us: float
    torch_us: float


def choose_products(model: Any) -> list[Measured]:
    """Measure, and have `ops` take what was faster from now on; on every rank what was faster on the first.

    model: a `LayerParallelDrafter` with its weights, on the device. Returns what this rank measured; nothing where no
    own operator serves.
    """
    measured: list[Measured] = []
    worse: set[tuple[str, bool, int]] = set()
    if model.wqkv.is_cuda and ops.is_short(model.wqkv.new_empty(1, model.shape.hidden_size)):
        measured = _measure(model)
        worse = {(m.operator, m.at_once > 1, m.tokens) for m in measured if m.torch_us < m.own_us}
    group = get_tp_group()
    ops.TORCHS_PRODUCTS.clear()
    ops.TORCHS_PRODUCTS.update(group.broadcast_object(worse, src=0) if group.world_size > 1 else worse)
    if measured:
        own = len(measured) - len(worse)
        logger.info(
            "easyspec: own products serve in %d of %d cases, by time: %s", own, len(measured), _summary(measured)
        )
    return measured


def _summary(measured: list[Measured]) -> str:
    return ", ".join(f"{m.operator} x{m.at_once} of {m.tokens}: {m.own_us:.1f}/{m.torch_us:.1f} us" for m in measured)


@torch.inference_mode()
def _measure(model: Any) -> list[Measured]:
    found = []
    for at_once in (1, GROUP):
        for tokens in TOKENS:
            for operator, (layers, call) in _calls(model, at_once, tokens).items():
                if layers < at_once or not ops.serves(call(ops.arguments, 0)):
                    continue
                own, reference = getattr(torch.ops.vllm_easyspec, operator).default, ops.reference_of(operator)
                if not _agree(call(own, 0), call(reference, 0)):
                    logger.warning_once(
                        "easyspec: on this GPU %s of %d tokens differs from torch's product, so it is not used. Please "
                        "report this with the GPU's name and the drafter.",
                        operator,
                        tokens,
                    )
                    found.append(Measured(operator, at_once, tokens, float("inf"), 0.0))
                    continue
                firsts = range(0, layers - at_once + 1, at_once)
                times = [_microseconds(call, way, firsts) / (len(firsts) * at_once) for way in (own, reference)]
                found.append(Measured(operator, at_once, tokens, *times))
    return found


Call = Callable[[Callable[..., Any], int], Any]


def _calls(model: Any, at_once: int, tokens: int) -> dict[str, tuple[int, Call]]:
    """By operator: how many layers there are, and a call of it or of what stands in for it, from a layer on."""
    shape, eps = model.shape, model.shape.rms_norm_eps
    x = torch.randn(at_once, tokens, shape.hidden_size, dtype=model.dtype, device=model.wqkv.device)
    mixed = torch.randn(at_once, tokens, shape.q_size, dtype=model.dtype, device=model.wqkv.device)

    def project(way: Callable[..., Any], first: int) -> Any:
        columns = shape.q_size + 2 * shape.kv_size
        norms, weights, scales = model.attention_norms, model.wqkv, model.wqkv_scales
        return way(x[0], norms, weights, scales, model.bqkv, first, at_once, columns, eps)

    def among_zeros(way: Callable[..., Any], first: int) -> Any:
        return way(mixed, model.wo, model.wo_scales, model.bo, first, at_once, 0, 1, shape.hidden_size)

    def mlps(way: Callable[..., Any], first: int) -> Any:
        into = (model.w_gate_up, model.w_gate_up_scales, model.b_gate_up)
        out_of = (model.w_down, model.w_down_scales)
        return way(x, model.mlp_norms, *into, *out_of, x[0], first, len(model.mlp_shard), eps)

    local, all_layers = model.wqkv.shape[0], model.w_down.shape[0]
    return {
        "norm_and_project": (local, project),
        "project_among_zeros": (local, among_zeros),
        "sum_of_mlps": (all_layers, mlps),
    }


def _agree(own: torch.Tensor, reference: torch.Tensor) -> bool:
    difference = (own.float() - reference.float()).abs().max()
    return bool(difference <= LARGEST_DIFFERENCE * reference.float().abs().max())


def _microseconds(call: Call, way: Callable[..., Any], firsts: range) -> float:
    """On the device, of the calls from each of `firsts` on, replayed from a CUDA graph; the median."""

    def run() -> None:
        for first in firsts:
            call(way, first)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return median(times)
