"""What a GPU takes for the products of a draft step, several ways, at published shapes: `gpu_products.py --json FILE`.

For each sublayer of a drafter and each number of tokens: microseconds a layer of the weights as they lie (input-major,
`x @ w`), of the transposed layout (`torch.nn.functional.linear`), both alone and as one batched product of four layers,
and of the project's own operator, which takes the norm along. Each is a CUDA graph that goes through all layers of the
model, so that no cache holds what is read. The floor is what the weights' bytes take at the measured bandwidth.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_easyspec import ops  # noqa: E402
from vllm_easyspec.bench.report import surroundings, write  # noqa: E402

SHAPES = ROOT / "tests" / "fixtures" / "hf_configs"
DRAFTERS = ("Qwen2.5-0.5B-Instruct", "Llama-3.2-1B-Instruct", "Qwen2.5-1.5B-Instruct")
TOKENS = (1, 2, 4, 6, 8, 16)
GROUP = 4
REPLAYS = 20


def timed_us(run: Callable[[], Any]) -> float:
    """Microseconds that `run` takes on the device, replayed from a graph; the median."""
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
    """Bytes a second that a sum reads, the best of ten."""
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


def measure_model(name: str, bandwidth: float, save: Callable[[list[dict]], None]) -> list[dict]:
    config = json.loads((SHAPES / name / "config.json").read_text())
    layers, hidden, width = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    layers -= layers % GROUP
    rows: list[dict] = []
    weights = {
        part: torch.randn(layers, *shape, device="cuda", dtype=torch.bfloat16) * shape[0] ** -0.5
        for part, shape in sublayers(config).items()
    }
    norms = torch.ones(layers, hidden, device="cuda", dtype=torch.bfloat16)
    for tokens in TOKENS:
        for part, w in weights.items():
            inner, columns = w.shape[1:]
            x = torch.randn(GROUP, tokens, inner, device="cuda", dtype=torch.bfloat16)
            turned = w.transpose(1, 2).contiguous()
            singles, groups = range(layers), range(0, layers, GROUP)
            ways: dict[str, Callable[[], Any]] = {
                "input_major": lambda: [torch.matmul(x[0], w[i]) for i in singles],
                "transposed": lambda: [F.linear(x[0], turned[i]) for i in singles],
                "input_major_group": lambda: [torch.matmul(x, w[i : i + GROUP]) for i in groups],
                "transposed_group": lambda: [torch.bmm(x, turned[i : i + GROUP].transpose(1, 2)) for i in groups],
            }
            if tokens <= ops.FEW_TOKENS_CUDA:
                if part == "qkv":
                    ways["own"] = lambda: [ops.norm_and_project(x[0], norms, w, None, i, 1, 1e-6) for i in singles]
                    ways["own_group"] = lambda: [
                        ops.norm_and_project(x[0], norms, w, None, i, GROUP, 1e-6) for i in groups
                    ]
                elif part == "o":
                    ways["own"] = lambda: [ops.project_among_zeros(x[:1], w, None, i, 1, 0, 1) for i in singles]
                    ways["own_group"] = lambda: [ops.project_among_zeros(x, w, None, i, GROUP, 0, 1) for i in groups]
            floor = w[0].nbytes / bandwidth * 1e6
            row = {"drafter": name, "tokens": tokens, "part": part, "floor_us": round(floor, 2)}
            for way, run in ways.items():
                row[way] = round(timed_us(run) / layers, 2)
            rows.append(row)
            del turned
        # Both products of an MLP, and what is between them.
        x = torch.randn(GROUP, tokens, hidden, device="cuda", dtype=torch.bfloat16)
        args = norms, weights["gate_up"], None, weights["down"], x[0]
        floor = (weights["gate_up"][0].nbytes + weights["down"][0].nbytes) / bandwidth * 1e6
        row = {"drafter": name, "tokens": tokens, "part": "mlp", "floor_us": round(floor, 2)}
        reference = ops.REFERENCES[torch.ops.vllm_easyspec.sum_of_mlps.default]
        ways = {
            "input_major": lambda: [reference(x[:1], *args, i, 1e-6) for i in range(layers)],
            "input_major_group": lambda: [reference(x, *args, i, 1e-6) for i in range(0, layers, GROUP)],
        }
        if tokens <= ops.FEW_TOKENS_CUDA:
            ways["own"] = lambda: [ops.sum_of_mlps(x[:1], *args, i, 1e-6) for i in range(layers)]
            ways["own_group"] = lambda: [ops.sum_of_mlps(x, *args, i, 1e-6) for i in range(0, layers, GROUP)]
        for way, run in ways.items():
            row[way] = round(timed_us(run) / layers, 2)
        rows.append(row)
        save(rows)
    vocabulary = torch.randn(config["vocab_size"], hidden, device="cuda", dtype=torch.bfloat16)
    row = {"drafter": name, "tokens": 1, "part": "lm_head", "floor_us": round(vocabulary.nbytes / bandwidth * 1e6, 2)}
    x = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16)
    row["transposed"] = round(timed_us(lambda: F.linear(x, vocabulary)), 2)
    logits = F.linear(x, vocabulary)
    row["argmax"] = round(timed_us(lambda: logits.argmax(-1)), 2)
    return [*rows, row]


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
        rows += measure_model(name, bandwidth, lambda some: write(args.json, around | {"rows": rows + some}))
    write(args.json, around | {"rows": rows})
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
