"""The figures of `tools/gpu_check.py`: drafting against vLLM's draft_model, and whole engines, at published shapes.

Weights are dummies, so acceptance is vLLM's synthetic one and only times count. `stages DRAFTER`: a target of two
layers, so that drafting dominates; vLLM's `draft_model` and easyspec under three plans, in turn. The drafting stage is
what `propose` takes on the device, both timed by the same clock. `engine ARM`: a target of Qwen2.5 32B's shape with a
drafter of Qwen2.5 0.5B's shape, K=5, a synthetic acceptance length of 4. The target gets the drafter's vocabulary of
151,936 (its own has 128 rows more), since vLLM refuses draft_model otherwise.

A plan is swapped in a running engine, then its CUDA graphs are captured. If rounds drafted eagerly all the same, though
there are graphs, the exit code is 1 in the end; the figures are kept.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vllm_easyspec.bench.processes import alone
from vllm_easyspec.bench.report import surroundings, write, write_text
from vllm_easyspec.bench.step_clock import StepClock
from vllm_easyspec.drafter.plan import LayerPlan
from vllm_easyspec.metrics import StageClock

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "tests" / "fixtures" / "hf_configs"
TARGET, DRAFTER = "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-0.5B-Instruct"
DRAFTS = 5
ACCEPTANCE_LENGTH = 4.0
TINY = dict(  # a CPU's rehearsal
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
)
# On a GPU so many that neither its cache nor the time of a launch counts.
BANDWIDTH_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}
# Positions after the last token: a round whose drafts may fill the context is not drafted from graphs, and the host
# takes all drafts of the rounds that it has not seen yet for accepted.
ROOM = 64
DRAFT_MODEL_SHOWS = ("speculator", "compilation_mode", "cudagraph_mode", "speculator_compiled", "speculator_graphs")


class Probe(StepClock):
    """vLLM's `worker_extension_cls`: the clock, and what a step has to read against how fast this device reads."""

    def read_bandwidth(self) -> float:
        """Bytes a second that a sum reads from the device's memory, the best of ten."""
        device = self.model_runner.device
        data = torch.ones(BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        clocks = []
        for _ in range(10):
            clock = StageClock(device)
            clock.start("draft")
            data.sum()
            clock.stop("draft")
            clocks.append(clock)
        return data.nbytes / (min(clock.medians()["draft"] or 1e9 for clock in clocks) / 1e3)

    def start_trace(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profiler.start()

    def stop_trace(self) -> dict[str, list]:
        """What ran on the device since `start_trace`: names, and for each kernel or copy its name's index, its start
        and its duration in microseconds, in order."""
        torch.cuda.synchronize()
        self.profiler.stop()
        events = [
            event
            for event in self.profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us() > 0
        ]
        events.sort(key=lambda event: event.time_range.start)
        names = list(dict.fromkeys(short_name(event.name) for event in events))
        first = events[0].time_range.start if events else 0
        rows = [
            [
                names.index(short_name(event.name)),
                round(event.time_range.start - first, 1),
                round(event.time_range.elapsed_us(), 1),
            ]
            for event in events
        ]
        return {"names": names, "kernels": rows}

    def step_bytes(self, batch: int, context: int) -> int:
        """What one step of easyspec's drafter reads: its weights but for unused rows of the embedding, and the K/V."""
        from vllm_easyspec.bench.draft_step import bytes_a_step

        return bytes_a_step(self.model_runner.speculator, batch, context)


def short_name(name: str) -> str:
    """A kernel's name without template arguments and parameters."""
    for word in ("void ", "easyspec::", "(anonymous namespace)::", "at::native::"):
        name = name.replace(word, "")
    return name.split("(")[0][:80]


@contextmanager
def shape(name: str, device: str, **changes: Any) -> Iterator[str]:
    """A folder with a published configuration, tiny on a CPU, and nothing else."""
    config = json.loads((SHAPES / name / "config.json").read_text())
    config |= (TINY if device == "cpu" else {}) | changes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


@contextmanager
def engine(
    target: str, device: str, speculative: dict | None, batch: int, length: int, gpu_share: float = 0.6
) -> Iterator[Any]:
    from vllm import LLM

    synthetic = dict(rejection_sample_method="synthetic", synthetic_acceptance_length=ACCEPTANCE_LENGTH)
    where = dict(kv_cache_memory_bytes=1 << 28) if device == "cpu" else dict(gpu_memory_utilization=gpu_share)
    llm = LLM(
        target,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32" if device == "cpu" else "bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        # Processes of the engine have this folder on their path, since this one has.
        worker_extension_cls=f"{Path(__file__).stem}.{Probe.__name__}",
        speculative_config=speculative and speculative | synthetic | dict(num_speculative_tokens=DRAFTS),
        **where,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm: Any, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds for `batch` requests together."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=random).tolist()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
    took = time.perf_counter() - began
    assert all(len(out.outputs[0].token_ids) == new_tokens for out in outs)
    return took


def plans(layers: int) -> dict[str, dict]:
    grouped = list(LayerPlan.grouped(layers, 4, 1, 1).group_sizes)
    return {
        "precise": dict(scope="attention", group_sizes=[1] * layers),
        "attention": dict(scope="attention", group_sizes=grouped),
        "block": dict(scope="block", group_sizes=grouped),
    }


def use(llm: Any, plan: dict, batch: int) -> None:
    """Draft so from now on, from graphs where there are any: for `batch` requests, and for fewer towards their end."""
    llm.collective_rpc("easyspec_configure", kwargs=plan)
    wanted = dict(batch_sizes=list(range(1, batch + 1)), num_speculative_tokens=[DRAFTS])
    llm.collective_rpc("easyspec_capture", kwargs=wanted)


def drafted_eagerly(rows: list[dict]) -> list[str]:
    """Rows whose rounds did not all draft from graphs, though there are some: they can't be compared with others."""
    return [
        f"{row['arm']}, batch {row['batch']}: {row['graphs']['eager_rounds']} rounds drafted without a CUDA graph"
        for row in rows
        if "graphs" in row and row["graphs"]["captured"] and row["graphs"]["eager_rounds"]
    ]


Save = Callable[[str, list[dict]], None]  # of a drafter's rows


def measure_stages(name: str, device: str, save: Save, save_traces: Callable[[str, dict], None]) -> list[dict]:
    """Rows: the drafting stage and its steps of one drafter, by batch size."""
    with shape(name, device) as drafter, shape(name, device, num_hidden_layers=2) as target:
        rows = alone(time_draft_model, target, drafter, device)
        save(name, rows)
        baseline = {row["batch"]: row["stage_ms"] for row in rows}
        timed, traces = alone(time_easyspec, target, drafter, device)
        for row in timed:
            rows.append(row | {"draft_model_over_stage": round(baseline[row["batch"]] / row["stage_ms"], 2)})
        save(name, rows)
        save_traces(name, traces)
        return rows


def stage_sizes(device: str) -> tuple[int, int, int, tuple[int, ...]]:
    """Tokens of a prompt, generated tokens, turns, batch sizes."""
    return (256, 128, 3, (1, 8)) if device == "cuda" else (32, 16, 1, (1, 2))


def time_draft_model(target: str, drafter: str, device: str) -> list[dict]:
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
    spec = dict(method="draft_model", model=drafter)
    with engine(target, device, spec, max(batches), context + new_tokens + ROOM) as llm:
        resolved = llm.collective_rpc("bench_attach")[0]
        shown = {name: resolved[name] for name in DRAFT_MODEL_SHOWS}
        for batch in batches:
            generate(llm, batch, context, new_tokens)  # warms up
            llm.collective_rpc("bench_times")
            for _ in range(turns):
                generate(llm, batch, context, new_tokens)
            stage = llm.collective_rpc("bench_times")[0]["draft"]
            rows.append({"arm": "draft_model", "batch": batch, "stage_ms": round(stage, 4)} | shown)
    return rows


def time_easyspec(target: str, drafter: str, device: str) -> tuple[list[dict], dict[str, dict]]:
    """Plans take turns, and the first turn warms up. The rows, and a trace of some rounds of each plan."""
    traces: dict[str, dict] = {}
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
    spec = dict(method="easyspec", model=drafter)
    with engine(target, device, spec, max(batches), context + new_tokens + ROOM) as llm:
        chosen = plans(json.loads((Path(drafter) / "config.json").read_text())["num_hidden_layers"])
        bandwidth = llm.collective_rpc("read_bandwidth")[0]
        llm.collective_rpc("bench_attach")
        for batch in batches:
            taken: dict[str, list[tuple]] = {arm: [] for arm in chosen}
            graphs = {}
            for turn in range(turns + 1):
                for arm, plan in chosen.items():
                    use(llm, plan, batch)
                    llm.collective_rpc("bench_times")
                    generate(llm, batch, context, new_tokens)
                    counted = llm.collective_rpc("easyspec_stats")[0]
                    times, graphs[arm] = counted["stage_ms"], counted["graphs"]
                    if turn:
                        stage = llm.collective_rpc("bench_times")[0]["draft"]
                        taken[arm].append((stage, times["calibrate"], times["draft"] / (DRAFTS - 1)))
            if device == "cuda" and batch == 1:
                for arm, plan in chosen.items():
                    use(llm, plan, batch)
                    generate(llm, batch, context, 2)
                    llm.collective_rpc("start_trace")
                    generate(llm, batch, context, 9)
                    traces[arm] = llm.collective_rpc("stop_trace")[0]
            moved = llm.collective_rpc("step_bytes", args=(batch, context + new_tokens // 2))[0]
            floor = 1e3 * moved / bandwidth
            precise = median(step for _, _, step in taken["precise"])
            for arm, measured in taken.items():
                stage, calibrate, step = (median(times) for times in zip(*measured, strict=True))
                rows.append(
                    {
                        "arm": arm,
                        "batch": batch,
                        "stage_ms": round(stage, 4),
                        "calibrate_ms": round(calibrate, 4),
                        "step_ms": round(step, 4),
                        "floor_ms": round(floor, 4),
                        "step_over_floor": round(step / floor, 2),
                        "precise_over_step": round(precise / step, 2),
                        "bandwidth_tb_s": round(bandwidth / 1e12, 3),
                        "graphs": graphs[arm],
                    }
                )
    return rows, traces


def measure_engine(arm: str, device: str, save: Save) -> list[dict]:
    """Rows: tokens a second of a whole engine, the prompt's time included. They are kept after each turn."""
    prompt_tokens, new_tokens, turns = (128, 256, 3) if device == "cuda" else (16, 16, 1)
    batches = (1, 8) if device == "cuda" else (1, 2)
    rows: list[dict] = []
    with shape(DRAFTER, device) as drafter, shape(TARGET, device, vocab_size=vocabulary(drafter)) as target:
        layers = json.loads((Path(drafter) / "config.json").read_text())["num_hidden_layers"]
        chosen: dict[str, dict] = plans(layers) if arm == "easyspec" else {arm: {}}
        spec = None if arm == "none" else dict(method=arm, model=drafter)
        # The target's weights alone take 61 GiB.
        with engine(target, device, spec, max(batches), prompt_tokens + new_tokens + ROOM, gpu_share=0.9) as llm:
            taken: dict[tuple[str, int], list[float]] = {(name, batch): [] for batch in batches for name in chosen}
            graphs = {}
            for turn in range(turns + 1):  # the first warms up
                for (name, batch), seconds in taken.items():
                    if plan := chosen[name]:
                        use(llm, plan, batch)
                    took = generate(llm, batch, prompt_tokens, new_tokens)
                    if plan:
                        graphs[name, batch] = {"graphs": llm.collective_rpc("easyspec_stats")[0]["graphs"]}
                    if turn:
                        seconds.append(took)
                if turn:
                    rows = [
                        {"arm": name, "batch": batch, "tokens_a_second": round(batch * new_tokens / median(seconds), 1)}
                        | graphs.get((name, batch), {})
                        for (name, batch), seconds in taken.items()
                    ]
                    save(DRAFTER, rows)
    return rows


def vocabulary(folder: str) -> int:
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["stages", "engine"])
    parser.add_argument("of", metavar="DRAFTER|ARM", help="a folder of tests/fixtures/hf_configs, or an engine's arm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    around = surroundings()

    def save(drafter: str, rows: list[dict]) -> None:
        named = [{"drafter": drafter} | row for row in rows]
        write(args.json, around | {"rows": named})

    def save_traces(drafter: str, traces: dict) -> None:
        if traces:
            path = args.json.with_name(f"{args.json.stem}-trace.json")
            write_text(path, json.dumps(around | {"drafter": drafter, "traces": traces}))

    if args.figure == "stages":
        rows = measure_stages(args.of, args.device, save, save_traces)
    else:
        rows = measure_engine(args.of, args.device, save)
    if eager := drafted_eagerly(rows):
        sys.exit("\n".join(eager))


if __name__ == "__main__":
    main()
