"""A group's attention outputs on all ranks: all-reduce into zeros against all-gather and reorder, in turns.

Layers of a group live on the ranks in turn, as in serving, so that a gathered tensor has to be put in order. Real
ranks with vLLM's collectives of this platform; medians in microseconds of one rank, its Python included. JSON last.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from vllm.distributed import (
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from vllm_easyspec.bench.report import surroundings, table, write
from vllm_easyspec.ranks import run_ranks


def reduced(own: torch.Tensor, group: int) -> torch.Tensor:
    """own: this rank's `[layers, tokens, hidden]` of `[group, tokens, hidden]`, which comes back."""
    ranks = get_tp_group()
    outputs = own.new_zeros(group, *own.shape[1:])
    outputs[ranks.rank_in_group :: ranks.world_size] = own
    return tensor_model_parallel_all_reduce(outputs)


def gathered(own: torch.Tensor, group: int) -> torch.Tensor:
    ranks = get_tp_group().world_size
    everyones = tensor_model_parallel_all_gather(own, dim=0)
    return everyones.unflatten(0, (ranks, -1)).transpose(0, 1).reshape(group, *own.shape[1:])


@torch.inference_mode()
def measure(hidden: int, groups: list[int], batches: list[int], repetitions: int) -> list[dict]:
    ranks = get_tp_group()
    gpu = ranks.device.type == "cuda"
    ways: dict[str, Callable] = {"all_reduce": reduced, "all_gather": gathered}
    rows = []
    for group in groups:
        for tokens in batches:
            own = torch.randn(group // ranks.world_size, tokens, hidden, device=ranks.device)
            taken: dict[str, list[float]] = {name: [] for name in ways}
            results = {}
            for _ in range(repetitions):
                for name, way in ways.items():
                    ranks.barrier()
                    began = time.perf_counter()
                    results[name] = way(own, group)
                    if gpu:
                        torch.accelerator.synchronize()
                    taken[name].append(time.perf_counter() - began)
            assert results["all_reduce"].equal(results["all_gather"])
            times = {f"{name}_us": round(1e6 * median(one[repetitions // 5 :]), 1) for name, one in taken.items()}
            rows.append({"group": group, "tokens": tokens, "hidden": hidden, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    groups = [args.ranks, 2 * args.ranks, 4 * args.ranks]
    rows = []
    for hidden in args.hidden:
        rows += run_ranks(args.ranks, measure, hidden, groups, [1, 8, 32], args.repetitions)[0]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    result = surroundings() | {"ranks": args.ranks, "rows": rows}
    write(args.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
