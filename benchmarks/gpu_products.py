"""Times of a draft step's matrix products on a GPU, computed in several ways, at published shapes: `--json FILE`.

For each sublayer of a drafter and each number of tokens: microseconds per layer with input-major weights (`x @ w`),
with transposed weights (`torch.nn.functional.linear`), each for single layers and as one batched product of four
layers, and with the project's own operator, which includes the norm. Each is a CUDA graph over all layers of the model,
so that the weights are not in a cache. The floor is the time of the weights' bytes at the measured bandwidth.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shapes import SHAPES  # noqa: E402

from vllm_easyspec import ops  # noqa: E402
from vllm_easyspec.bench.results import surroundings, write  # noqa: E402

DRAFTERS = ("Qwen2.5-0.5B-Instruct", "Llama-3.2-1B-Instruct", "Qwen2.5-1.5B-Instruct")
TOKENS = (1, 2, 4, 6, 8, 16)
GROUP = 4
REPLAYS = 20


def timed_us(run: Callable[[], Any]) -> float:
    """Device time of `run` in microseconds, replayed from a graph; the median."""
    for _ in range(2):
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


def read_bandwidth() -> float:
    """Bytes per second that a sum reads, the best of ten."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    best = min(timed_us(data.sum) for _ in range(3))
    return data.nbytes / best * 1e6


def sublayers(config: dict) -> dict[str, tuple[int, int]]:
    """Rows and columns of each sublayer's matrix."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    width = config["intermediate_size"]
    return {"qkv": (hidden, q + 2 * kv), "o": (q, hidden), "gate_up": (hidden, 2 * width), "down": (width, hidden)}


def ways_of_product(part: str, x: torch.Tensor, w: torch.Tensor, norms: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to compute a sublayer's product in all layers: x `[GROUP, tokens, inner]`, w `[layers, inner, columns]`."""
    turned = w.transpose(1, 2).contiguous()
    singles, groups = range(w.shape[0]), range(0, w.shape[0], GROUP)
    ways: dict[str, Callable[[], Any]] = {
        "input_major": lambda: [torch.matmul(x[0], w[i]) for i in singles],
        "transposed": lambda: [F.linear(x[0], turned[i]) for i in singles],
        "input_major_group": lambda: [torch.matmul(x, w[i : i + GROUP]) for i in groups],
        "transposed_group": lambda: [torch.bmm(x, turned[i : i + GROUP].transpose(1, 2)) for i in groups],
    }
    if x.shape[1] > ops.FEW_TOKENS_CUDA:
        return ways
    project, among_zeros, columns = ops.norm_and_project, ops.project_among_zeros, w.shape[2]
    if part == "qkv":
        ways["own"] = lambda: [project(x[0], norms, w, None, None, i, 1, columns, 1e-6) for i in singles]
        ways["own_group"] = lambda: [project(x[0], norms, w, None, None, i, GROUP, columns, 1e-6) for i in groups]
    elif part == "o":
        ways["own"] = lambda: [among_zeros(x[:1], w, None, None, i, 1, 0, 1, columns) for i in singles]
        ways["own_group"] = lambda: [among_zeros(x, w, None, None, i, GROUP, 0, 1, columns) for i in groups]
    return ways


def ways_of_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, norms: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Ways to compute the MLPs of all layers, from norm to residual: x `[GROUP, tokens, hidden]`."""
    reference = ops.REFERENCES[torch.ops.vllm_easyspec.sum_of_mlps.default]
    args, width = (norms, gate_up, None, None, down, None, x[0]), down.shape[1]
    singles, groups = range(down.shape[0]), range(0, down.shape[0], GROUP)
    ways: dict[str, Callable[[], Any]] = {
        "input_major": lambda: [reference(x[:1], *args, i, width, 1e-6) for i in singles],
        "input_major_group": lambda: [reference(x, *args, i, width, 1e-6) for i in groups],
    }
    if x.shape[1] <= ops.FEW_TOKENS_CUDA:
        ways["own"] = lambda: [ops.sum_of_mlps(x[:1], *args, i, width, 1e-6) for i in singles]
        ways["own_group"] = lambda: [ops.sum_of_mlps(x, *args, i, width, 1e-6) for i in groups]
    return ways


def measure_model(name: str, bandwidth: float) -> Iterator[dict]:
    config = json.loads((SHAPES / name / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    layers -= layers % GROUP

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    def row(tokens: int, part: str, ways: dict[str, Callable[[], Any]], *weights: torch.Tensor) -> dict:
        layers_read = weights[0].shape[0]
        floor = sum(w.nbytes for w in weights) / layers_read / bandwidth * 1e6
        taken = {way: round(timed_us(run) / layers_read, 2) for way, run in ways.items()}
        return {"drafter": name, "tokens": tokens, "part": part, "floor_us": round(floor, 2), **taken}

    weights = {part: randn(layers, *shape) * shape[0] ** -0.5 for part, shape in sublayers(config).items()}
    norms = torch.ones(layers, hidden, device="cuda", dtype=torch.bfloat16)
    for tokens in TOKENS:
        for part, w in weights.items():
            yield row(tokens, part, ways_of_product(part, randn(GROUP, tokens, w.shape[1]), w, norms), w)
        mlp = weights["gate_up"], weights["down"]
        yield row(tokens, "mlp", ways_of_mlp(randn(GROUP, tokens, hidden), *mlp, norms), *mlp)
    vocabulary, x = randn(1, config["vocab_size"], hidden), randn(1, hidden)
    logits = F.linear(x, vocabulary[0])
    ways = {"transposed": lambda: F.linear(x, vocabulary[0]), "argmax": lambda: logits.argmax(-1)}
    yield row(1, "lm_head", ways, vocabulary)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    around = surroundings()
    bandwidth = read_bandwidth()
    rows: list[dict] = [{"bandwidth_tb_s": round(bandwidth / 1e12, 3)}]
    for name in args.drafters:
        for row in measure_model(name, bandwidth):
            rows.append(row)
            write(args.json, around | {"rows": rows})


if __name__ == "__main__":
    main()
