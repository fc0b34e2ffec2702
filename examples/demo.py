"""The tiny pair end to end: `vllm serve` with easyspec, queried with the `openai` client; then tuned against untuned.

Exits with 0 if the texts equal those of a second server, which decodes without speculation.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from serving import Server, ServerError, serve

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
MESSAGES = [{"role": "user", "content": "def __repr__(self):\n        return "}]


@dataclass(frozen=True)
class Texts:
    completion: str
    chat: str


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the server is stopped on the way out
    options = parse_arguments()
    ranks = options.tensor_parallel_size
    print(f"{options.model} with {options.config} on {ranks} rank{'s' * (ranks > 1)}, float32, greedy")

    with server("with easyspec", options, "--speculative-config", str(options.config)) as running:
        running.rpc("easyspec_stats", reset=True)
        texts = ask(running, options.max_tokens, show=True)
        report(running.rpc("easyspec_stats"))

    with server("without a drafter", options) as running:
        plain = ask(running, options.max_tokens, show=False)

    if texts == plain:
        print("Both texts equal plain decoding.")
        return compare_tuned(options)
    print(f"DIFFERENT from plain decoding, which gave:\n{plain.completion}\n--- and ---\n{plain.chat}", file=sys.stderr)
    return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=relative(ROOT / "examples/tiny-pair/target"), help="the target")
    parser.add_argument(
        "--config", type=Path, default=relative(ROOT / "configs/tiny-pair.yaml"), help="easyspec's YAML"
    )
    parser.add_argument(
        "--tuned", type=Path, default=relative(ROOT / "configs/tiny-pair-tuned.yaml"), help="by vllm-easyspec tune"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=min(2, places()), help="ranks")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per answer")
    return parser.parse_args()


@contextmanager
def server(what: str, options: argparse.Namespace, *arguments: str) -> Iterator[Server]:
    print(f"\nStarting vllm serve {what} ...", end=" ", flush=True)
    began = time.monotonic()
    # Without easyspec vLLM needs a NUMA node per rank, unless it is told the cores of each rank.
    binding = "|".join(str(core) for core in cores()[: options.tensor_parallel_size])
    plain_on_cpu = options.tensor_parallel_size > 1 and not arguments
    with serve(
        options.model,
        *("--tensor-parallel-size", str(options.tensor_parallel_size), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "64M"),
        *arguments,
        environment={"VLLM_CPU_OMP_THREADS_BIND": binding} if plain_on_cpu else {},
    ) as running:
        print(f"{time.monotonic() - began:.0f} s")
        yield running


def ask(running: Server, max_tokens: int, show: bool) -> Texts:
    """A completion and a streamed chat."""
    client = running.client()
    settings = {"model": running.model, "temperature": 0, "max_tokens": max_tokens}
    completion = client.completions.create(prompt=PROMPT, **settings).choices[0].text
    if show:
        print(f"\n--- completion\n{PROMPT}{completion}\n--- chat, streamed", flush=True)
    chat = ""
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **settings):
        piece = chunk.choices[0].delta.content or ""
        chat += piece
        if show:
            print(piece, end="", flush=True)
    if show:
        print("\n---")
    return Texts(completion, chat)


def report(ranks: list[dict]) -> None:
    """Print what the drafter did. ranks: the counters of each rank."""
    first = ranks[0]
    if not first["verified"]:
        raise RuntimeError(f"the drafter drafted nothing: {first}")
    plan = first["plan"]
    accepted = "  ".join(f"{100 * share:.0f}%" for share in first["acceptance"])
    print(f"plan                   {plan}, {first['scope']} scope, K = {first['num_speculative_tokens']}")
    print(f"tokens per round       {first['tokens_a_round']:.2f} over {first['verified']} rounds")
    print(f"acceptance by position {accepted}")
    for rank in ranks:
        times = ", ".join(f"{stage} {took:.1f} ms" for stage, took in rank["stage_ms"].items() if took is not None)
        print(f"times on rank {rank['rank']}        {times}")


def compare_tuned(options: argparse.Namespace) -> int:
    """Run `compare.py`, which prints what it measures. Returns its exit code."""
    print(f"\nThe same drafter, tuned ({options.tuned}), in turn with the above in one engine ...", flush=True)
    given = ["--model", options.model, "--untuned", options.config, "--tuned", options.tuned]
    given += ["--tensor-parallel-size", options.tensor_parallel_size]
    return subprocess.run([sys.executable, str(ROOT / "examples" / "compare.py"), *map(str, given)]).returncode


def places() -> int:
    """The number of GPUs, or of cores if there is no GPU."""
    return torch.cuda.device_count() or len(cores())


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def relative(path: Path) -> Path:
    """`path` relative to the current folder, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
