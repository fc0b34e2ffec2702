"""Each native operator against its plain-torch reference, on one thread, at the shapes of a drafter's layers.

Both are called in turn; times are medians, Python's call included. Prints JSON last; --json FILE saves it.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from vllm_easyspec import ops
from vllm_easyspec.bench.results import surroundings, table, write
from vllm_easyspec.packing import pack

RANKS, NUM_BLOCKS, BLOCK_SIZE = 2, 100, 32


@dataclass(frozen=True)
class Shape:
    """Of a drafter's layer; `width` is one rank's share of the MLP's."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int


SHAPES = [Shape("tiny pair", 128, 4, 2, 32, 192), Shape("Qwen2.5 0.5B", 896, 14, 2, 64, 2432)]


def cases(shape: Shape, tokens: int, layers: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments by operator."""
    hidden, heads, kv_heads, head_dim, width = (
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.width,
    )

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size).to(dtype)

    q_size, columns = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    norms = randn(layers, hidden)
    rows = torch.empty(layers * tokens, dtype=torch.int64)
    return {
        "advance_draft_inputs": (
            torch.ones(tokens, dtype=torch.int64),
            torch.full((tokens,), 255),
            torch.ones(tokens, dtype=torch.bool),
            torch.ones(tokens, 300, dtype=torch.int32),
            torch.empty(tokens, dtype=torch.int64),
            rows,
            rows.int(),
            rows.clone(),
            BLOCK_SIZE,
            NUM_BLOCKS,
            1 << 30,
        ),
        "calibration_inputs": calibration(tokens, layers),
        "embed_shard": (torch.arange(tokens), randn(256, hidden), 4, 256),
        "group_rms_norm": (randn(tokens, hidden), norms, 1e-6),
        "prefix_sums": (randn(tokens, hidden), randn(layers, tokens, hidden)),
        "rotate_and_store": (
            randn(layers, tokens, heads + 2 * kv_heads, head_dim),
            torch.full((layers * tokens,), 255),
            randn(512, head_dim),
            heads,
            kv_heads,
            True,
            None,
            None,
            0,
            1e-6,
            None,
            None,
        ),
        "norm_and_project": (
            randn(tokens, hidden),
            norms,
            randn(layers, hidden, columns),
            None,
            None,
            0,
            layers,
            columns,
            1e-6,
        ),
        "project_among_zeros": (
            randn(layers, tokens, q_size),
            randn(layers, q_size, hidden),
            None,
            None,
            0,
            RANKS * layers,
            0,
            RANKS,
            hidden,
        ),
        "sum_of_mlps": (
            randn(layers, tokens, hidden),
            norms,
            randn(layers, hidden, 2 * width),
            None,
            None,
            randn(layers, width, hidden),
            None,
            None,
            0,
            width,
            1e-6,
        ),
        "group_features": (randn(tokens, hidden), randn(tokens, hidden), 1e-6),
        "look_ahead": (
            randn(layers, tokens, hidden),
            randn(tokens, 4 * hidden),
            randn(layers, 5 * hidden, hidden // 2).bfloat16(),
            randn(layers, hidden // 2, hidden).bfloat16(),
            randn(layers, hidden).bfloat16(),
            layers,
            False,
            1e-6,
        ),
    }


def packed(operator: Any, arguments: tuple) -> tuple:
    """The arguments as the native operator takes them: the products with packed weights."""
    name = operator.name().partition("::")[2]
    parts = {"norm_and_project": {2: 1}, "project_among_zeros": {1: 1}, "sum_of_mlps": {2: 2, 5: 1}}.get(name, {})
    return tuple(pack(a, parts[i]) if i in parts else a for i, a in enumerate(arguments))


def calibration(rows: int, requests: int) -> tuple:
    """`rows` rows for each of some requests."""
    of_req = torch.arange(requests).repeat_interleave(rows)
    ones = torch.ones(requests, dtype=torch.int64)
    return (
        torch.ones(requests * (rows + 1), dtype=torch.int32),
        torch.arange(requests) * (rows + 1),
        ones * 255,
        ones * rows,
        ones > 0,
        ones,
        torch.ones(requests, 300, dtype=torch.int32),
        of_req,
        torch.arange(len(of_req)) % rows,
        ones,
        (torch.arange(requests + 1) * rows).int(),
        BLOCK_SIZE,
        1 << 30,
        256,
        True,
    )


def measure(repetitions: int) -> list[dict]:
    rows = []
    for shape, dtype, tokens, layers in product(SHAPES, (torch.float32, torch.bfloat16), (1, 8, 16, 64), (1, 4)):
        for name, arguments in cases(shape, tokens, layers, dtype).items():
            operator = getattr(torch.ops.vllm_easyspec, name).default
            native_us, reference_us = interleaved(operator, ops.REFERENCES[operator], arguments, repetitions)
            rows.append(
                {
                    "operator": name,
                    "shape": shape.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "layers": layers,
                    "native_us": native_us,
                    "reference_us": reference_us,
                    "speedup": round(reference_us / native_us, 2),
                }
            )
    return rows


@torch.inference_mode()
def interleaved(operator, reference, arguments: tuple, repetitions: int) -> tuple[float, float]:
    """Median microseconds of each. The reference uses no native operators inside."""
    times: tuple[list[float], list[float]] = ([], [])
    plain_norm = ops.REFERENCES[torch.ops.vllm_easyspec.group_rms_norm.default]
    native = packed(operator, arguments)
    with patch.object(ops, "group_rms_norm", plain_norm):
        for _ in range(repetitions):
            for call, given, seconds in zip((operator, reference), (native, arguments), times, strict=True):
                began = time.perf_counter()
                call(*given)
                seconds.append(time.perf_counter() - began)
    return round(1e6 * median(times[0]), 2), round(1e6 * median(times[1]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the result here")
    arguments = parser.parse_args()
    if ops.WHY_NOT_NATIVE is not None:
        sys.exit(f"no native operators to measure: {ops.WHY_NOT_NATIVE}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = surroundings() | {"rows": measure(arguments.repetitions)}
    header = ("operator", "shape", "dtype", "tokens", "layers", "native_us", "reference_us", "speedup")
    print(table(header, ([row[name] for name in header] for row in result["rows"])))
    print(json.dumps(result, indent=1))
    write(arguments.json, result)


if __name__ == "__main__":
    main()
