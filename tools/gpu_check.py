"""`make gpu-check`: build, correctness, then figures on a host with a GPU, within one budget of time.

Each part runs in a process of its own with its own time limit, so that a failure or a hang costs that part alone.
Checks share the GPU, several at once; what is timed has it to itself.
Results are written as they are obtained, one file a part, `benchmarks/results/gpu-PART.json`; the table comes last. The
exit code is 1 if a check failed or got no time. Without a GPU this says so and exits with 0.

`--device cpu` rehearses the same parts on a CPU: the trained tiny pair, and tiny shapes in place of published ones. Its
times mean nothing, and its files are named cpu-rehearsal-PART.json.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS, FIGURES = "tools/gpu_checks.py", "benchmarks/gpu_figures.py"

DRAFTERS = ("Llama-3.2-1B-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct")


@dataclass(frozen=True)
class Part:
    name: str
    is_check: bool
    command: tuple[str, ...]  # after this Python
    least_s: int  # not begun with less time left
    most_s: int  # ended after this
    environment: tuple[tuple[str, str], ...] = ()
    shares_gpu: bool = False


def parts(device: str) -> list[Part]:
    """In the order in which they run: correctness first, then the figures by worth."""
    engine = {"attention_config": {"backend": "TRITON_ATTN"}, "gpu_memory_utilization": 0.3} if device == "cuda" else {}
    on_gpu = (("EASYSPEC_TEST_ENGINE", json.dumps(engine)),)

    def check(name: str, *arguments: str, least: int = 40, most: int = 150) -> Part:
        return Part(name, True, (CHECKS, *arguments), least, most, shares_gpu=True)

    def tests(name: str, *arguments: str) -> Part:
        return Part(name, True, ("-m", "pytest", "-q", *arguments), 30, 150, on_gpu, shares_gpu=True)

    def figure(name: str, *arguments: str, least: int = 40, most: int = 120) -> Part:
        return Part(name, False, (FIGURES, *arguments), least, most)

    found = [check("identity-eager", "identity", "float32")]
    if device == "cuda":
        found.append(check("identity-graphs", "identity", "float32", "--graphs"))
    found.append(check("bfloat16", "identity", "bfloat16", *(["--graphs"] if device == "cuda" else [])))
    found.append(tests("sampling", "tests/e2e/test_sampling.py", "-k", "probabilistic and not full"))
    if (ROOT / "csrc").is_dir():
        found = [Part("build", True, ("setup.py", "build_ext", "--inplace"), 20, 200), *found]
        found.append(tests("operators", "tests/ops"))
    if device == "cuda":
        found.append(tests("tests-gpu", "-m", "gpu", "tests"))
        found.append(check("xformers", "identity", "bfloat16", "--xformers"))
    drafters = DRAFTERS if device == "cuda" else DRAFTERS[1:2]
    stages = [figure(f"stages-{name}", "stages", name) for name in drafters]
    end_to_end = [figure(f"engine-{arm}", "engine", arm) for arm in ("none", "draft_model", "easyspec")]
    return [*found, *stages[:1], *end_to_end, *stages[1:]]


def run(part: Part, device: str, seconds: float, result: Path) -> dict:
    """Run one part for at most `seconds`. What it wrote to `result` comes back with its outcome beside it."""
    began = time.monotonic()
    environment = os.environ | dict(part.environment)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, *part.command]
    if part.command[0] in (CHECKS, FIGURES):
        command += ["--device", device, "--json", str(result)]
    result.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # A part's engine has processes of its own; none may hold the GPU's memory afterwards.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        log.seek(0)
        output = log.read()
    no_tests = part.command[:2] == ("-m", "pytest") and code == 5
    outcome = {0: "passed", None: f"no end after {seconds:.0f} s"}.get(code, f"failed with exit code {code}")
    found = json.loads(result.read_text()) if result.exists() else {}
    found |= {
        "part": part.name,
        "device": device,
        "outcome": "skipped: no such tests" if no_tests else outcome,
        "seconds": round(time.monotonic() - began, 1),
    }
    if outcome != "passed":
        found["output"] = output[-4000:]
    result.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS")
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

    def attempt(part: Part) -> dict:
        left = deadline - time.monotonic()
        if left < part.least_s:
            return {"part": part.name, "outcome": f"not run: {max(0, left):.0f} s of the budget were left"}
        print(f"gpu-check: {part.name}", flush=True)
        found = run(part, args.device, min(left, part.most_s), args.results / f"{prefix}-{part.name}.json")
        if found["outcome"] != "passed":
            print(f"gpu-check: {part.name} {found['outcome']}\n{found['output'][-1500:]}", flush=True)
        return found

    chosen = [part for part in known if not args.only or part.name in args.only]
    jobs = args.jobs or (3 if args.device == "cuda" else 1)
    results: list[dict] = []
    for shared, some in groupby(chosen, key=lambda part: part.shares_gpu):
        with ThreadPoolExecutor(jobs if shared else 1) as pool:
            results += pool.map(attempt, some)
    good = ("passed", "skipped")
    bad = any(
        part.is_check and not found["outcome"].startswith(good) for part, found in zip(chosen, results, strict=True)
    )
    print_table(results)
    return int(bad)


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
