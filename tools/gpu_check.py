"""`make gpu-check`: build, correctness checks and measurements on a host with a GPU, within one time budget.

Each part runs in its own process with its own time limit, so that a failure or a hang costs only that part. Several
checks at a time share the GPU. Meanwhile the engines to be timed start, as many as fit into the GPU's memory; when all
have started and no check runs, each has the GPU to itself in turn. Results are written as they are obtained, one file
per part, `benchmarks/results/gpu-PART.json`; the table comes last. The exit code is 1 if a check failed or got no time.
Ctrl-C and SIGTERM end the running parts and print the table; the exit code is then 130 or 143. Without a GPU this says
so and exits with 0.

`--device cpu` rehearses the same parts on a CPU: the trained tiny pair, and tiny shapes in place of published ones. Its
times mean nothing, and its files are named cpu-rehearsal-PART.json.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_easyspec.bench.results import write  # noqa: E402

CHECKS, FIGURES = "tools/gpu_checks.py", "benchmarks/gpu_figures.py"
# What was built must also load, with CUDA kernels if this torch has CUDA: only a process started after the build can
# tell.
BUILD = """
import subprocess, sys
subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], check=True)
from vllm_easyspec import ops
sys.exit(ops.WHY_NOT_NATIVE)
"""
OUTPUT_KEPT = 20_000  # characters of a part's output, in its result
# Less than ten minutes, a common limit of commands: ending the last part and printing the table take some seconds.
BUDGET_S = 570

# GiB of an engine with this drafter and a target of two layers.
DRAFTERS = {"Qwen2.5-0.5B-Instruct": 6, "Qwen2.5-1.5B-Instruct": 9, "Llama-3.2-1B-Instruct": 8}
# What to run first on a new host, about eight minutes; `--set rest` runs the others, half as long.
FIRST = (
    "build",
    "operators-gpu",
    "identity-eager",
    "bfloat16",
    *(f"stages-Qwen2.5-{size}-Instruct-{arm}" for size in ("0.5B", "1.5B") for arm in ("easyspec", "draft_model")),
    "engine-easyspec",
)
# Tests of the operators that run on the device that EASYSPEC_TEST_DEVICE names.
ON_GPU = [f"tests/ops/test_{name}.py" for name in ("layer_ops", "advance_draft_inputs", "calibration_inputs")]


@dataclass(frozen=True)
class Part:
    name: str
    is_check: bool
    command: tuple[str, ...]  # after this Python process
    least_s: int  # not started with less time left
    most_s: int  # ended after this
    environment: tuple[tuple[str, str], ...] = ()  # unless the user sets them
    shares_gpu: bool = False
    gib: int = 0  # of the GPU's memory; parts with this start early and measure in turn

    def files(self, folder: Path, device: str) -> tuple[Path, Path]:
        """The file of its result, and the file by which it waits for its turn."""
        result = folder / f"{'gpu' if device == 'cuda' else 'cpu-rehearsal'}-{self.name}.json"
        return result, result.with_suffix(".turn")


def parts(device: str) -> list[Part]:
    """The parts in their order: correctness first, then measurements, the most useful first."""
    engine = {"attention_config": {"backend": "TRITON_ATTN"}, "gpu_memory_utilization": 0.3} if device == "cuda" else {}
    # The tests' engines use float32, which must be exact here as in gpu_checks.py.
    for_tests = (("EASYSPEC_TEST_ENGINE", json.dumps(engine)), ("TRITON_F32_DEFAULT", "ieee"))
    for_build = (("EASYSPEC_NATIVE", "required"), ("EASYSPEC_NVCC_ARCH", "native"))

    def check(name: str, *arguments: str, most: int = 220) -> Part:
        return Part(name, True, (CHECKS, *arguments), 40, most, shares_gpu=True)

    def tests(name: str, *arguments: str) -> Part:
        return Part(name, True, ("-m", "pytest", "-q", *arguments), 30, 150, for_tests, shares_gpu=True)

    def figure(name: str, gib: int, *arguments: str, most: int = 400) -> Part:
        return Part(name, False, (FIGURES, *arguments), 60, most, gib=gib)

    found = [check("identity-eager", "identity", "float32")]
    if device == "cuda":
        # Triton takes minutes to compile vLLM's attention in float32 for the shapes that are captured.
        found.append(check("identity-graphs", "identity", "float32", "--graphs", most=400))
    found.append(check("bfloat16", "identity", "bfloat16", *(["--graphs"] if device == "cuda" else [])))
    found.append(tests("sampling", "tests/e2e/test_sampling.py", "-k", "probabilistic and not full"))
    if (ROOT / "csrc").is_dir():
        found = [Part("build", True, ("-c", BUILD), 20, 200, for_build), *found]
        found.append(tests("operators", "tests/ops"))
        if device == "cuda":
            on_gpu = (*for_tests, ("EASYSPEC_TEST_DEVICE", "cuda"))
            found.insert(1, Part("operators-gpu", True, ("-m", "pytest", "-q", *ON_GPU), 30, 150, on_gpu, True))
    if device == "cuda":
        found.append(tests("tests-gpu", "-m", "gpu", "tests"))
        found.append(check("xformers", "identity", "bfloat16", "--xformers"))
        found.append(Part("products", False, ("benchmarks/gpu_products.py",), 30, 90))
    # Both arms of a drafter start together, so that they are compared on one machine within a minute.
    found += [
        figure(f"stages-{name}-{arm}", gib, "stages", name, arm)
        for name, gib in (DRAFTERS.items() if device == "cuda" else [("Qwen2.5-0.5B-Instruct", 1)])
        for arm in ("easyspec", "draft_model")
    ]
    return [*found, *(figure(f"engine-{arm}", 66, "engine", arm) for arm in ("easyspec", "draft_model", "none"))]


class Running:
    """The processes of running parts, which a signal ends at once, with all that they started."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen] = set()
        self.signal = 0  # the signal that came

    def stop(self, number: int, _frame: object) -> None:
        """A signal handler. It raises nothing: parts that it ends have results like any other."""
        self.signal = number
        for process in list(self.processes):
            end(process)

    @property
    def why_stopped(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}"

    @contextmanager
    def started(self, command: list[str], **arguments: Any) -> Iterator[subprocess.Popen]:
        process = subprocess.Popen(command, start_new_session=True, **arguments)
        self.processes.add(process)
        try:
            if self.signal:  # it came between the check before this and the line above
                end(process)
            yield process
        finally:
            # A part's engine has its own processes; none may keep GPU memory.
            end(process)
            process.wait()
            self.processes.discard(process)


def end(process: subprocess.Popen) -> None:
    """Kill the process and its group, which it leads."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(part: Part, device: str, seconds: float, folder: Path, running: Running) -> dict:
    """Run one part for at most `seconds`. Returns the result that it wrote, with its outcome."""
    began = time.monotonic()
    result, turn = part.files(folder, device)
    environment = dict(part.environment) | os.environ
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, *part.command]
    if part.command[0] in (CHECKS, FIGURES):
        command += ["--device", device]
    if part.gib:
        command += ["--turn", str(turn)]
    if part.command[0].endswith(".py"):
        command += ["--json", str(result)]
    result.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with running.started(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
        log.seek(0)
        output = log.read()
    found = left_behind(result)
    if running.signal and code == -signal.SIGKILL:
        outcome = running.why_stopped
    elif code is None:
        outcome = f"no end after {seconds:.0f} s"
    elif skipped := why_skipped(part, code, output, found):
        outcome = f"skipped: {skipped}"
    else:
        outcome = f"failed with exit code {code}" if code else "passed"
    found |= {
        "part": part.name,
        "device": device,
        "outcome": outcome,
        "seconds": round(time.monotonic() - began, 1),
        "output": output[-OUTPUT_KEPT:],
    }
    write(result, found)
    return found


def left_behind(result: Path) -> dict:
    """What a part wrote; empty if it wrote nothing that can be read."""
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def why_skipped(part: Part, code: int, output: str, found: dict) -> str | None:
    """Why a part checked nothing, from its end; None if it checked something, or failed."""
    if part.command[:2] == ("-m", "pytest"):
        if code == 5:
            return "no such tests"
        return "each of its tests was skipped" if code == 0 and not re.search(r"\d passed", output) else None
    return found.get("skipped") if code == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, metavar="N", help="checks at once (default: 3, on a CPU 1)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--set", choices=["all", "first", "rest"], default="all", help="half of the parts")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "gpu-check: this host has no CUDA device, so nothing was checked. (--device cpu rehearses the parts.)"
            )
            return 0
    known = parts(args.device)
    unknown = set(args.only or ()) - {part.name for part in known}
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: allowed are {' '.join(part.name for part in known)}")
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in known if not args.only or part.name in args.only]
    if args.set != "all":
        chosen = [part for part in chosen if (part.name in FIRST) == (args.set == "first")]
    jobs = args.jobs or (3 if args.device == "cuda" else 1)
    schedule = Schedule(args.device, args.results, time.monotonic() + args.budget, jobs)
    handlers = {number: signal.signal(number, schedule.running.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        by_name = schedule.run(chosen, device_gib(args.device))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    results = [by_name[part.name] for part in chosen]
    running = schedule.running
    print_table(results)
    if running.signal:
        return 128 + running.signal
    return int(any(part.is_check and not is_good(found) for part, found in zip(chosen, results, strict=True)))


class Schedule:
    """What runs together: single parts in order, then checks and the first engines, then the engines in turn."""

    def __init__(self, device: str, folder: Path, deadline: float, jobs: int):
        self.device, self.folder, self.deadline, self.jobs = device, folder, deadline, jobs
        self.running = Running()

    def run(self, chosen: list[Part], gib: int) -> dict[str, dict]:
        """The parts' results by name."""
        found = {part.name: self.attempt(part) for part in chosen if not part.shares_gpu and not part.gib}
        checks = [part for part in chosen if part.shares_gpu]
        for engines in waves([part for part in chosen if part.gib], gib) or [[]]:
            found |= self.wave(checks, engines)
            checks = []
        return found

    def wave(self, checks: list[Part], engines: list[Part]) -> dict[str, dict]:
        for part in engines:
            for left_over in (".ready", ".go"):
                self.turn(part, left_over).unlink(missing_ok=True)
        with ThreadPoolExecutor(self.jobs) as some, ThreadPoolExecutor(max(1, len(engines))) as all_of_them:
            started = {part.name: all_of_them.submit(self.attempt, part) for part in engines}
            checked = {part.name: some.submit(self.attempt, part) for part in checks}
            for done in checked.values():
                done.result()
            for part in engines:
                while not (self.turn(part, ".ready").exists() or started[part.name].done()):
                    time.sleep(0.05)
            for part in engines:
                self.turn(part, ".go").touch()
                started[part.name].result()
        for part in engines:
            for left_over in (".ready", ".go"):
                self.turn(part, left_over).unlink(missing_ok=True)
        return {name: done.result() for name, done in (checked | started).items()}

    def turn(self, part: Part, suffix: str) -> Path:
        return part.files(self.folder, self.device)[1].with_suffix(suffix)

    def attempt(self, part: Part) -> dict:
        left = self.deadline - time.monotonic()
        if self.running.signal:
            return {"part": part.name, "outcome": f"not run: {self.running.why_stopped}"}
        if left < part.least_s:
            return {"part": part.name, "outcome": f"not run: {max(0, left):.0f} s of the budget were left"}
        print(f"gpu-check: {part.name}", flush=True)
        found = run(part, self.device, min(left, part.most_s), self.folder, self.running)
        if not is_good(found):
            print(f"gpu-check: {part.name} {found['outcome']}\n{found['output'][-1500:]}", flush=True)
        return found


def waves(engines: list[Part], gib: int) -> list[list[Part]]:
    """Engines that start together: in order, as many as fit into the memory; one that doesn't fit starts alone."""
    found: list[list[Part]] = []
    for part in engines:
        if not found or sum(other.gib for other in found[-1]) + part.gib > gib:
            found.append([])
        found[-1].append(part)
    return found


def device_gib(device: str) -> int:
    """The GPU's memory; on a CPU, where memory is the host's, room for two engines."""
    if device == "cpu":
        return 2
    import torch

    return torch.cuda.get_device_properties(0).total_memory >> 30


def is_good(found: dict) -> bool:
    return found["outcome"].startswith(("passed", "skipped"))


def print_table(results: list[dict]) -> None:
    print("\npart | seconds | outcome")
    for found in results:
        print(f"{found['part']} | {found.get('seconds', 0)} | {found['outcome']}")
        for row in found.get("rows", []):
            print("    " + ", ".join(f"{key} {value}" for key, value in row.items()))
    rates = {
        (row["arm"], row["batch"]): row["tokens_a_second"]
        for found in results
        for row in found.get("rows", [])
        if "tokens_a_second" in row
    }
    for (arm, batch), rate in rates.items():
        for baseline in ("none", "draft_model"):
            if arm not in ("none", baseline) and (baseline, batch) in rates:
                print(f"{arm}, batch {batch}: {rate / rates[baseline, batch]:.2f} times {baseline}'s tokens per second")
    stages = {
        (row["drafter"], row["batch"], row["arm"]): row["stage_ms"]
        for found in results
        for row in found.get("rows", [])
        if "stage_ms" in row
    }
    for (drafter, batch, arm), stage in stages.items():
        if (baseline_ms := stages.get((drafter, batch, "draft_model"))) and arm != "draft_model":
            ratio = baseline_ms / stage
            print(f"{drafter}, batch {batch}: {arm}'s drafting stage {ratio:.2f} times as fast as draft_model's")


if __name__ == "__main__":
    sys.exit(main())
