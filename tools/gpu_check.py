"""`make gpu-check`: build, correctness, then figures on a host with a GPU, within one budget of time.

Each part runs in a process of its own with its own time limit, so that a failure or a hang costs that part alone.
Checks share the GPU, several at once; what is timed has it to itself.
Results are written as they are obtained, one file a part, `benchmarks/results/gpu-PART.json`; the table comes last. The
exit code is 1 if a check failed or got no time. Ctrl-C and SIGTERM end the parts that run, and the table still comes;
the exit code is then 130 or 143. Without a GPU this says so and exits with 0.

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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_easyspec.bench.report import write  # noqa: E402

CHECKS, FIGURES = "tools/gpu_checks.py", "benchmarks/gpu_figures.py"
# What was built must also load, and hold CUDA's kernels where this torch has CUDA: only a process that starts after the
# build can tell.
BUILD = """
import subprocess, sys
subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], check=True)
from vllm_easyspec import ops
sys.exit(ops.WHY_NOT_NATIVE)
"""
OUTPUT_KEPT = 20_000  # characters of a part's output, in its result
# Less than the ten minutes that a command often gets: the last part's end and the table take some seconds.
BUDGET_S = 570

DRAFTERS = ("Llama-3.2-1B-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct")


@dataclass(frozen=True)
class Part:
    name: str
    is_check: bool
    command: tuple[str, ...]  # after this Python
    least_s: int  # not begun with less time left
    most_s: int  # ended after this
    environment: tuple[tuple[str, str], ...] = ()  # where the user's does not say otherwise
    shares_gpu: bool = False


def parts(device: str) -> list[Part]:
    """In the order in which they run: correctness first, then the figures by worth."""
    engine = {"attention_config": {"backend": "TRITON_ATTN"}, "gpu_memory_utilization": 0.3} if device == "cuda" else {}
    # The tests' engines are in float32, which is to be exact here as it is in gpu_checks.py.
    for_tests = (("EASYSPEC_TEST_ENGINE", json.dumps(engine)), ("TRITON_F32_DEFAULT", "ieee"))
    for_build = (("EASYSPEC_NATIVE", "required"), ("EASYSPEC_NVCC_ARCH", "native"))

    def check(name: str, *arguments: str) -> Part:
        return Part(name, True, (CHECKS, *arguments), 40, 150, shares_gpu=True)

    def tests(name: str, *arguments: str) -> Part:
        return Part(name, True, ("-m", "pytest", "-q", *arguments), 30, 150, for_tests, shares_gpu=True)

    def figure(name: str, *arguments: str, least: int, most: int) -> Part:
        return Part(name, False, (FIGURES, *arguments), least, most)

    found = [check("identity-eager", "identity", "float32")]
    if device == "cuda":
        found.append(check("identity-graphs", "identity", "float32", "--graphs"))
    found.append(check("bfloat16", "identity", "bfloat16", *(["--graphs"] if device == "cuda" else [])))
    found.append(tests("sampling", "tests/e2e/test_sampling.py", "-k", "probabilistic and not full"))
    if (ROOT / "csrc").is_dir():
        found = [Part("build", True, ("-c", BUILD), 20, 200, for_build), *found]
        found.append(tests("operators", "tests/ops"))
        if device == "cuda":
            on_gpu = (*for_tests, ("EASYSPEC_TEST_DEVICE", "cuda"))
            files = [
                f"tests/ops/test_{name}.py" for name in ("layer_ops", "advance_draft_inputs", "calibration_inputs")
            ]
            found.insert(1, Part("operators-gpu", True, ("-m", "pytest", "-q", *files), 30, 150, on_gpu, True))
    if device == "cuda":
        found.append(tests("tests-gpu", "-m", "gpu", "tests"))
        found.append(check("xformers", "identity", "bfloat16", "--xformers"))
    drafters = DRAFTERS if device == "cuda" else DRAFTERS[1:2]
    stages = [figure(f"stages-{name}", "stages", name, least=40, most=120) for name in drafters]
    # The arms whose ratio counts most come first: the last may find no time.
    arms = ("easyspec", "none", "draft_model")
    end_to_end = [figure(f"engine-{arm}", "engine", arm, least=90, most=180) for arm in arms]
    if device == "cuda":
        found.append(Part("products", False, ("benchmarks/gpu_products.py",), 30, 90))
    return [*found, *stages[:1], *end_to_end, *stages[1:]]


class Running:
    """The processes of the parts that run, which a signal ends at once, with all that they started."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen] = set()
        self.signal = 0  # the one that came

    def stop(self, number: int, _frame: object) -> None:
        """A signal's handler. It raises nothing: parts that are ended have results like any other."""
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
            # A part's engine has processes of its own; none may hold the GPU's memory afterwards.
            end(process)
            process.wait()
            self.processes.discard(process)


def end(process: subprocess.Popen) -> None:
    """Kill the process and its group, which it leads."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(part: Part, device: str, seconds: float, result: Path, running: Running) -> dict:
    """Run one part for at most `seconds`. What it wrote to `result` comes back with its outcome beside it."""
    began = time.monotonic()
    environment = dict(part.environment) | os.environ
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, *part.command]
    if part.command[0] in (CHECKS, FIGURES):
        command += ["--device", device]
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
    """What a part wrote; empty where it wrote nothing, or nothing that can be read."""
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def why_skipped(part: Part, code: int, output: str, found: dict) -> str | None:
    """Why a part that ended so checked nothing; None where it did, or failed."""
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
    deadline = time.monotonic() + args.budget
    args.results.mkdir(parents=True, exist_ok=True)
    prefix = "gpu" if args.device == "cuda" else "cpu-rehearsal"
    running = Running()

    def attempt(part: Part) -> dict:
        left = deadline - time.monotonic()
        if running.signal:
            return {"part": part.name, "outcome": f"not run: {running.why_stopped}"}
        if left < part.least_s:
            return {"part": part.name, "outcome": f"not run: {max(0, left):.0f} s of the budget were left"}
        print(f"gpu-check: {part.name}", flush=True)
        file = args.results / f"{prefix}-{part.name}.json"
        found = run(part, args.device, min(left, part.most_s), file, running)
        if not is_good(found):
            print(f"gpu-check: {part.name} {found['outcome']}\n{found['output'][-1500:]}", flush=True)
        return found

    chosen = [part for part in known if not args.only or part.name in args.only]
    jobs = args.jobs or (3 if args.device == "cuda" else 1)
    results: list[dict] = []
    handlers = {number: signal.signal(number, running.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for shared, some in groupby(chosen, key=lambda part: part.shares_gpu):
            with ThreadPoolExecutor(jobs if shared else 1) as pool:
                results += pool.map(attempt, some)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print_table(results)
    if running.signal:
        return 128 + running.signal
    return int(any(part.is_check and not is_good(found) for part, found in zip(chosen, results, strict=True)))


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
                print(f"{arm}, batch {batch}: {rate / rates[baseline, batch]:.2f} times {baseline}'s tokens a second")


if __name__ == "__main__":
    sys.exit(main())
