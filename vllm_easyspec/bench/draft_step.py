"""`bench draft-step`: a step of the drafter alone, fuzzy plans against the precise one, in real ranks with real pages.

All plans run the same code on the same weights and pages. They take turns, loop by loop, so that drift of the machine
affects all alike. The loop of a round is timed, K - 1 steps of one token for each of `batch` requests at the end of
`context` tokens: inputs, forward pass, arg-max over the ranks' logits; from CUDA graphs on a GPU. It lasts until the
slowest rank is done; a step is its (K - 1)th part.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.graphs import DraftGraph
from vllm_easyspec.metrics import plan_json
from vllm_easyspec.ranks import run_ranks

BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # read in some milliseconds
NUM_DRAFTS = 5  # K
ROOM = 32  # positions after the context, for the drafts


def measure(
    drafter: str,
    ranks: int,
    plans: Sequence[tuple[int, ...]] | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    dtype: str = "float32",
    load_format: str = "auto",
    options: RuntimeOptions | None = None,
    repetitions: int = 60,
) -> list[dict[str, Any]]:
    """Rows with the keys `scope, plan, ranks, batch, context, step_ms, precise_ms, speedup, floor_ms` and more.

    plans: group sizes of each plan, None for the default plan; options: of the drafter, without plans; times are
    medians in milliseconds.
    """
    arguments = (drafter, plans, batches, contexts, dtype, load_format, options or RuntimeOptions(), repetitions)
    by_rank = run_ranks(ranks, _measure_rank, *arguments, timeout_s=1800)
    return [_slowest(rows) for rows in zip(*by_rank, strict=True)]


def _slowest(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One row from those of all ranks, which differ little, because collectives make ranks wait for one another."""
    step, precise = max(row["step_ms"] for row in rows), max(row["precise_ms"] for row in rows)
    floor = max(row["floor_ms"] for row in rows)
    return rows[0] | {
        "step_ms": round(step, 4),
        "precise_ms": round(precise, 4),
        "speedup": round(precise / step, 3),
        "bytes": max(row["bytes"] for row in rows),
        "floor_ms": round(floor, 4),
        "floor_share": round(floor / step, 3),
    }


def _measure_rank(
    path: str,
    plans: Sequence[tuple[int, ...]] | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    dtype: str,
    load_format: str,
    options: RuntimeOptions,
    repetitions: int,
) -> list[dict[str, Any]]:
    drafter = EnginelessDrafter(
        path,
        options,
        dtype=dtype,
        load_format=load_format,
        max_num_reqs=max(batches),
        max_len=max(contexts) + ROOM,
        num_drafts=NUM_DRAFTS,
        graph_sizes=batches if current_platform.is_cuda() else (),
    )
    layers = drafter.model.shape.num_layers
    groupings = plans or [options.layer_parallel.draft_plan(layers).group_sizes]
    chosen = [DraftPlan.of_sizes(layers, sizes, scope) for sizes in groupings for scope in SCOPES]
    bandwidth = read_bandwidth(drafter.device)
    rows = []
    for batch in batches:
        for context in contexts:
            times = _interleaved(drafter, [drafter.precise, *chosen], batch, context, repetitions)
            moved = bytes_a_step(drafter.model, batch, context)
            for plan in chosen:
                rows.append(
                    plan_json(plan)
                    | {
                        "ranks": drafter.model.num_ranks,
                        "batch": batch,
                        "context": context,
                        "mlp": drafter.model.mlp.value,
                        "step_ms": 1e3 * times[plan],
                        "precise_ms": 1e3 * times[drafter.precise],
                        "bytes": moved,
                        "floor_ms": 1e3 * moved / bandwidth,
                    }
                )
    return rows


@torch.inference_mode()
def _interleaved(
    drafter: EnginelessDrafter, plans: list[DraftPlan], batch: int, context: int, repetitions: int
) -> dict[DraftPlan, float]:
    """Median seconds of a step of each plan; the first fifth warms up."""
    loop, graphs = drafter.loop, drafter.graphs
    recorded = {plan: DraftGraph.draft(batch, NUM_DRAFTS, plan) for plan in plans}
    if graphs is not None:
        loop.record(graphs, list(recorded.values()))
    times: dict[DraftPlan, list[float]] = {plan: [] for plan in plans}
    for repetition in range(repetitions + repetitions // 5):
        for plan in recorded:
            loop.positions[:batch] = context - 1
            loop.live[:batch] = True
            get_tp_group().barrier()
            _synchronize(drafter.device)
            began = time.perf_counter()
            if graphs is None:
                loop.draft(batch, NUM_DRAFTS, plan, context + NUM_DRAFTS)
            else:
                graphs.replay(recorded[plan])
            _synchronize(drafter.device)
            if repetition >= repetitions // 5:
                times[plan].append(time.perf_counter() - began)
    return {plan: median(seconds) / (NUM_DRAFTS - 1) for plan, seconds in times.items()}


def bytes_a_step(model: LayerParallelDrafter, batch: int, context: int) -> int:
    """The bytes that a rank must read in a step: its weights without the embedding's unused rows, and the K/V."""
    embedding = model.embed_tokens.weight
    unused = 0 if model.head.is_embedding else embedding.nbytes
    a_token = 2 * model.shape.kv_size * embedding.element_size() * len(model.local_layers)
    return model.weight_bytes() - unused + batch * context * a_token


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that this rank reads from memory while all ranks do; the best of five."""
    size = BANDWIDTH_BYTES[device.type]
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        get_tp_group().barrier()
        _synchronize(device)
        began = time.perf_counter()
        data.sum()
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return size / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
