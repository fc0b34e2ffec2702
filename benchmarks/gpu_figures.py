"""The measurements of `tools/gpu_check.py`: drafting against vLLM's draft_model, and whole engines, at published
shapes.

Weights are dummies, so acceptance is vLLM's synthetic one and only times count. `stages DRAFTER ARM`: with a target of
two layers, so that drafting dominates, the device time of `propose`, of vLLM's `draft_model` or of easyspec under three
plans in turn, measured by the same code. `engine ARM`: a target of Qwen2.5 32B's shape with a drafter of Qwen2.5 0.5B's
shape, K = 5, a synthetic acceptance length of 4. The target gets the drafter's vocabulary of 151,936 (its own has 128
tokens more), because vLLM otherwise refuses draft_model.

Plans are changed in a running engine, then their CUDA graphs are captured. If rounds drafted eagerly although there are
graphs, the exit code is 1 at the end; the results are kept. With `--turn FILE` an engine that has started creates
FILE.ready and measures once FILE.go exists, so that several may start side by side.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shapes import model_folder

from vllm_easyspec.bench.results import surroundings, write
from vllm_easyspec.bench.step_clock import StepClock
from vllm_easyspec.documents import write_whole
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.metrics import StageClock

TARGET, DRAFTER = "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-0.5B-Instruct"
DRAFTS = 5
ACCEPTANCE_LENGTH = 4.0
TINY = dict(  # for a rehearsal on a CPU
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
)
# On a GPU enough that neither its cache nor the launch time matters.
BANDWIDTH_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}
# Positions after the last token: a round whose drafts may fill the context does not use graphs, and the host assumes
# that all drafts of rounds whose results it has not seen are accepted.
ROOM = 64
DRAFT_MODEL_SHOWS = ("speculator", "compilation_mode", "cudagraph_mode", "speculator_compiled", "speculator_graphs")


class Probe(StepClock):
    """vLLM's `worker_extension_cls`: the clock, and what a step has to read against how fast this device reads."""

    def read_bandwidth(self) -> float:
        """Bytes per second that a sum reads from the device's memory, the best of ten."""
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
        self.bench_profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.bench_profiler.start()

    def stop_trace(self) -> dict[str, list]:
        """What ran on the device since `start_trace`: names, and for each kernel or copy its name's index, its start
        and its duration in microseconds, in order."""
        torch.cuda.synchronize()
        self.bench_profiler.stop()
        events = [
            event
            for event in self.bench_profiler.events()
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

    def num_draft_layers(self) -> int:
        return self.model_runner.speculator.model.shape.num_layers

    def step_bytes(self, batch: int, context: int) -> int:
        """What one step of easyspec's drafter reads: its weights but for unused rows of the embedding, and the K/V."""
        from vllm_easyspec.bench.draft_step import bytes_a_step

        return bytes_a_step(self.model_runner.speculator.model, batch, context)


def short_name(name: str) -> str:
    """A kernel's name without template arguments and parameters."""
    for word in ("void ", "easyspec::", "(anonymous namespace)::", "at::native::"):
        name = name.replace(word, "")
    return name.split("(")[0][:80]


def shape(name: str, device: str, **changes: Any) -> str:
    """A folder with a published configuration, tiny on a CPU."""
    return model_folder(name, **(TINY if device == "cpu" else {}) | changes)


@contextmanager
def engine(target: str, device: str, speculative: dict | None, batch: int, length: int) -> Iterator[Any]:
    from vllm import LLM

    synthetic = dict(rejection_sample_method="synthetic", synthetic_acceptance_length=ACCEPTANCE_LENGTH)
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
        # Fixed, so that engines can start side by side: otherwise vLLM would measure the free memory.
        kv_cache_memory_bytes=1 << (28 if device == "cpu" else 30),
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
    grouped = list(DraftPlan.grouped(layers, 4, 1, 1).group_sizes)
    return {
        "precise": dict(scope="attention", group_sizes=[1] * layers),
        "attention": dict(scope="attention", group_sizes=grouped),
        "block": dict(scope="block", group_sizes=grouped),
    }


def use(llm: Any, plan: dict, batch: int) -> None:
    """Use this plan from now on, from graphs if there are any, for `batch` requests and fewer towards their end."""
    llm.collective_rpc("easyspec_configure", kwargs=plan)
    wanted = dict(batch_sizes=list(range(1, batch + 1)), num_speculative_tokens=[DRAFTS])
    llm.collective_rpc("easyspec_capture", kwargs=wanted)


def drafted_eagerly(rows: list[dict]) -> list[str]:
    """Rows whose rounds did not all draft from graphs, although there are some: they can't be compared."""
    return [
        f"{row['arm']}, batch {row['batch']}: {row['graphs']['eager_rounds']} rounds drafted without a CUDA graph"
        for row in rows
        if "graphs" in row and row["graphs"]["captured"] and row["graphs"]["eager_rounds"]
    ]


Save = Callable[[list[dict]], None]


def wait_for_turn(file: Path | None) -> None:
    """Report that this process has started, and wait until it has the device to itself."""
    if file is None:
        return
    file.with_suffix(".ready").touch()
    while not file.with_suffix(".go").exists():
        time.sleep(0.05)


def measure_stages(name: str, arm: str, device: str, turn: Path | None, save: Save, trace: Path) -> list[dict]:
    """Rows: the drafting stage and its steps of one drafter, by batch size."""
    drafter, target = shape(name, device), shape(name, device, num_hidden_layers=2)
    context, new_tokens, _, batches = stage_sizes(device)
    spec = dict(method=arm, model=drafter)
    with engine(target, device, spec, max(batches), context + new_tokens + ROOM) as llm:
        wait_for_turn(turn)
        if arm == "draft_model":
            rows = time_draft_model(llm, device)
        else:
            rows = time_easyspec(llm, json.loads((Path(drafter) / "config.json").read_text()), device)
        save(rows)
        if arm == "easyspec" and device == "cuda":
            write_whole(trace, json.dumps(surroundings() | {"drafter": name, "traces": trace_plans(llm)}))
    return rows


def stage_sizes(device: str) -> tuple[int, int, int, tuple[int, ...]]:
    """Tokens of a prompt, generated tokens, turns, batch sizes."""
    return (256, 128, 3, (1, 8)) if device == "cuda" else (32, 16, 1, (1, 2))


def time_draft_model(llm: Any, device: str) -> list[dict]:
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
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


def time_easyspec(llm: Any, config: dict, device: str) -> list[dict]:
    """Plans take turns, and the first turn warms up."""
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
    chosen = plans(config["num_hidden_layers"])
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
    return rows


def trace_plans(llm: Any) -> dict[str, dict]:
    """The device's work in two rounds of each plan, one request."""
    context, *_ = stage_sizes("cuda")
    traces = {}
    layers = llm.collective_rpc("num_draft_layers")[0]
    for arm, plan in plans(layers).items():
        use(llm, plan, 1)
        generate(llm, 1, context, 2)
        llm.collective_rpc("start_trace")
        generate(llm, 1, context, 9)
        traces[arm] = llm.collective_rpc("stop_trace")[0]
    return traces


def measure_engine(arm: str, device: str, turn: Path | None, save: Save) -> list[dict]:
    """Rows: tokens per second of a whole engine, prefill included. They are saved after each turn."""
    prompt_tokens, new_tokens, turns = (128, 128, 3) if device == "cuda" else (16, 16, 1)
    batches = (1, 8) if device == "cuda" else (1, 2)
    rows: list[dict] = []
    drafter = shape(DRAFTER, device)
    target = shape(TARGET, device, vocab_size=vocabulary(drafter))
    layers = json.loads((Path(drafter) / "config.json").read_text())["num_hidden_layers"]
    chosen: dict[str, dict] = plans(layers) if arm == "easyspec" else {arm: {}}
    spec = None if arm == "none" else dict(method=arm, model=drafter)
    with engine(target, device, spec, max(batches), prompt_tokens + new_tokens + ROOM) as llm:
        wait_for_turn(turn)
        llm.collective_rpc("bench_attach")
        taken: dict[tuple[str, int], list[float]] = {(name, batch): [] for batch in batches for name in chosen}
        more: dict[tuple[str, int], dict] = {}
        for repetition in range(turns + 1):  # the first warms up
            for (name, batch), seconds in taken.items():
                if plan := chosen[name]:
                    use(llm, plan, batch)
                if spec:
                    llm.collective_rpc("bench_times")
                took = generate(llm, batch, prompt_tokens, new_tokens)
                if spec:
                    times = llm.collective_rpc("bench_times")[0]
                    more[name, batch] = {f"{stage}_ms": round(ms, 3) for stage, ms in times.items() if ms}
                if plan:
                    more[name, batch]["graphs"] = llm.collective_rpc("easyspec_stats")[0]["graphs"]
                if repetition:
                    seconds.append(took)
            if repetition:
                rows = [
                    {"arm": name, "batch": batch, "tokens_a_second": round(batch * new_tokens / median(seconds), 1)}
                    | more.get((name, batch), {})
                    for (name, batch), seconds in taken.items()
                ]
                save(rows)
    return rows


def vocabulary(folder: str) -> int:
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    stages = commands.add_parser("stages")
    stages.add_argument("drafter", help="a folder of tests/fixtures/hf_configs")
    stages.add_argument("arm", choices=["draft_model", "easyspec"])
    commands.add_parser("engine").add_argument("arm", choices=["none", "draft_model", "easyspec"])
    for command in commands.choices.values():
        command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        command.add_argument("--json", type=Path, required=True)
        command.add_argument("--turn", type=Path, metavar="FILE", help="wait for FILE.go once the engine has started")
    args = parser.parse_args()
    around = surroundings()
    drafter = getattr(args, "drafter", DRAFTER)

    def save(rows: list[dict]) -> None:
        write(args.json, around | {"rows": [{"drafter": drafter} | row for row in rows]})

    if args.figure == "stages":
        trace = args.json.with_name(f"{args.json.stem}-trace.json")
        rows = measure_stages(drafter, args.arm, args.device, args.turn, save, trace)
    else:
        rows = measure_engine(args.arm, args.device, args.turn, save)
    if eager := drafted_eagerly(rows):
        sys.exit("\n".join(eager))


if __name__ == "__main__":
    main()
