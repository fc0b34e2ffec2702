"""A CPU round of the tiny pair with interpreted kernels against the same round with plain ones.

One rank, one request at a time, K=5, greedy, float32. `bench engine` runs with plain kernels, then with
TRITON_INTERPRETER_PLAIN_KERNELS=0, then with plain ones again, and so on. A round is the time between two streamed
chunks; figures are medians of the runs' medians. Fails if a run's tokens differ. Prints JSON last; --json FILE saves
it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from vllm_easyspec.bench.results import surroundings, write

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "TRITON_INTERPRETER_PLAIN_KERNELS"
ARMS = ("draft_model", "easyspec")


def run(plain: bool, args: argparse.Namespace) -> dict[str, dict]:
    """The rows of each arm."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "vllm_easyspec.cli", "bench", "engine"]
        command += ["--model", "examples/tiny-pair/target", "--config", "configs/tiny-pair.yaml"]
        command += ["--baselines", "draft_model", "--dtype", "float32", "--turns", "1", "--concurrency", "1"]
        command += ["--requests", str(args.requests), "--input-tokens", "64", "--output-tokens", str(args.new_tokens)]
        command += ["--engine", json.dumps({"kv_cache_memory_bytes": 1 << 27}), "--json", str(result)]
        environment = os.environ | {SWITCH: str(int(plain))}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        return {row["arm"]: row for row in json.loads(result.read_text())["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3, help="alternately plain and interpreted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.runs < 2:
        parser.error(f"--runs {args.runs} is not allowed: a comparison needs at least 2")
    runs = [(number % 2 == 0, run(number % 2 == 0, args)) for number in range(args.runs)]
    rows = [compare(arm, [(plain, found[arm]) for plain, found in runs]) for arm in ARMS]
    print("| drafting | interpreted ms per round | plain ms per round | times shorter | tokens per round |")
    print("|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(f"{row[key]:.2f}" for key in ("interpreted_ms", "plain_ms", "ratio", "tokens_a_round"))
        print(f"| {row['arm']} | {figures} |")
    result = surroundings() | {"settings": vars(args) | {"json": None}, "rows": rows}
    write(args.json, result)
    print(json.dumps(result, indent=1))


def compare(arm: str, runs: list[tuple[bool, dict]]) -> dict:
    if len({row["digest"] for _, row in runs}) > 1:
        raise SystemExit(f"{arm}: tokens with interpreted and with plain kernels differ")
    plain_ms, interpreted_ms = (
        median(row["itl_ms"]["median"] for plain, row in runs if plain == wanted) for wanted in (True, False)
    )
    return {
        "arm": arm,
        "plain_ms": round(plain_ms, 3),
        "interpreted_ms": round(interpreted_ms, 3),
        "ratio": round(interpreted_ms / plain_ms, 2),
        "tokens_a_round": runs[0][1]["tokens_a_round"],
        "digest": runs[0][1]["digest"],
    }


if __name__ == "__main__":
    main()
