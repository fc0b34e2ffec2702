"""`make soak`: mixed requests on a server with easyspec, for as long as leaks, lost requests and decay need to show.

On one and on two ranks, with a small K/V cache (preemptions), plans and K by batch size including 0 (pauses) and prefix
hits: greedy requests, which are compared token for token with the target alone; sampled ones, penalties, stops,
structured output; and streams that the client leaves after a few tokens. At the end every process's memory must be
flat, acceptance as at the beginning, the audit of live requests clean, and no request lost. Exits with 1 otherwise.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from serving import Server, serve  # noqa: E402

from vllm_easyspec.bench.results import surroundings, write  # noqa: E402

PAIR = ROOT / "examples" / "tiny-pair"
SPECULATION = {
    "method": "easyspec",
    "model": str(PAIR / "drafter"),
    "num_speculative_tokens": 4,
    "lookahead": str(PAIR / "lookahead.safetensors"),
    "layer_parallel": {
        "scope": "block",
        "plan": "1-8-1",
        "by_batch_size": [
            {"up_to": 6},
            {"up_to": 14, "scope": "attention", "plan": "1-4-4-1", "num_speculative_tokens": 2},
            {"num_speculative_tokens": 0},
        ],
    },
}
ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "256"]
ENGINE += ["--block-size", "32", "--num-gpu-blocks-override", "70", "--kv-cache-memory-bytes", "256M"]
ENGINE += ["--enforce-eager", "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
WAVES, WIDTHS = 20, (1, 0.25, 0.1, 0.5)  # of clients, as shares of the highest concurrency
PROMPTS, PREFIX = 120, "import os\nimport sys\n\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser()\n" * 3
AUDIT_LIMIT = 1e-4
GROWTH, SLACK = 1.02, 8 << 20  # of a process's memory from the third quarter of the run to the last
LEAST_KEPT = 0.9  # of the acceptance of the first half, in the second
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["a", "b"]}, "on": {"type": "boolean"}}, "required": ["on"]}
OTHERS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "top_p": 0.9, "n": 2},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0, "stop": ["\n\n", "self"], "logprobs": 2},
    {"temperature": 0, "extra_body": {"structured_outputs": {"json": SCHEMA}}},
]
ALONE = """
import json, sys
from vllm import LLM, SamplingParams
requests = json.load(open(sys.argv[1]))
llm = LLM(sys.argv[2], dtype="float32", max_model_len=512, max_num_seqs=16, block_size=32, enforce_eager=True,
          kv_cache_memory_bytes=1 << 28)
params = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for _, tokens in requests]
outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
json.dump([list(output.outputs[0].token_ids) for output in outputs], open(sys.argv[3], "w"))
"""


@dataclass
class Soak:
    """What the requests to one server came to."""

    requests: list[tuple[str, int]]  # greedy ones: prompt, tokens
    expected: list[list[int]]
    ended: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def send(self, client: openai.AsyncOpenAI, rng: random.Random) -> None:
        """One request of any kind."""
        index = rng.randrange(len(self.requests))
        prompt, tokens = self.requests[index]
        kind = rng.choices(["greedy", "other", "left"], [6, 2, 2])[0]
        common: dict[str, Any] = {"model": Server.model, "prompt": prompt}
        try:
            if kind == "greedy":
                extra = {"ignore_eos": True, "return_token_ids": True}
                answer = await client.completions.create(**common, max_tokens=tokens, temperature=0, extra_body=extra)
                found = answer.choices[0].model_extra["token_ids"]
                if found != self.expected[index]:
                    kind = "wrong"
                    self.failures.append(f"request {index}: {found} in place of {self.expected[index]}")
            elif kind == "other":
                await client.completions.create(**common, max_tokens=tokens, **rng.choice(OTHERS))
            else:
                stream = await client.completions.create(**common, max_tokens=400, temperature=0, stream=True)
                for _ in range(rng.randrange(1, 12)):
                    await anext(stream, None)
                await stream.close()
        except openai.OpenAIError as error:
            kind = "lost"
            self.failures.append(f"request {index}: {type(error).__name__}: {error}")
        self.ended[kind] += 1


def greedy_requests(folder: Path) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """Prompts from files that the pair's training left out, half of them after a common prefix; and the answers."""
    subprocess.run([sys.executable, PAIR / "held_out.py", folder / "prompts", "--count", str(PROMPTS)], check=True)
    rng = random.Random(0)
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts").read_text().splitlines()]
    requests = [(PREFIX * (i % 2) + text, rng.choice([8, 16, 32, 64])) for i, text in enumerate(texts)]
    (folder / "requests").write_text(json.dumps(requests))
    command = [sys.executable, "-c", ALONE, folder / "requests", PAIR / "target", folder / "answers"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return requests, json.loads((folder / "answers").read_text())


async def soak(server: Server, count: int, concurrency: int, state: Soak, drafts: bool) -> dict[str, Any]:
    """Send `count` requests, up to `concurrency` at a time. drafts: the server speculates."""
    rng = random.Random(1)
    client = server.async_client()
    memory: list[dict[str, int]] = []  # by process, over time
    acceptance: list[tuple[float, float]] = []  # drafts and accepted tokens at the start, the middle and the end
    began = time.monotonic()

    async def sends(turns: Iterator[int]) -> None:
        for _ in turns:
            await state.send(client, rng)

    async def watch() -> None:
        while True:
            memory.append(memory_by_process(server.process.pid))
            if len(acceptance) == 1 and state.ended.total() >= count / 2:
                acceptance.append(drafts_and_accepted(server))
            await asyncio.sleep(2)

    acceptance.append(drafts_and_accepted(server))
    watching = asyncio.create_task(watch())
    for wave in range(WAVES):
        turns = iter(range(count // WAVES))  # shared by the clients
        clients = max(1, int(concurrency * WIDTHS[wave % len(WIDTHS)]))
        await asyncio.gather(*(sends(turns) for _ in range(clients)))
    seconds = time.monotonic() - began
    watching.cancel()
    acceptance.append(drafts_and_accepted(server))
    found = {"seconds": round(seconds, 1), "ended": dict(state.ended), "megabytes_by_quarter": quarters(memory)}
    found["preemptions"] = total(server, "vllm:num_preemptions_total")
    if not drafts:
        await client.close()
        return found
    # The audit needs live requests.
    live = [asyncio.create_task(state.send(client, rng)) for _ in range(8)]
    audited = []
    while not all(task.done() for task in live):
        replies = await asyncio.to_thread(server.rpc, "easyspec_audit")
        audited += [request["largest_difference"] for rank in replies for request in rank]
        await asyncio.sleep(0.05)
    await client.close()
    first, second = ((after[1] - before[1]) / max(1.0, after[0] - before[0]) for before, after in pairwise(acceptance))
    stats = server.rpc("easyspec_stats")[0]
    return found | {
        "accepted_a_draft_by_half": [round(first, 3), round(second, 3)],
        "audited": len(audited),
        "largest_difference": max(audited, default=None),
        "stats": {name: stats[name] for name in ("rounds", "paused_rounds", "caught_up_tokens")},
    }


def memory_by_process(group: int) -> dict[str, int]:
    """Bytes that each process of the server has for itself, by its title."""
    found: dict[str, int] = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                name, size = process.name(), process.memory_full_info().uss
                found[name if name not in found else f"{name} {process.pid}"] = size
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def quarters(memory: list[dict[str, int]]) -> dict[str, list[float]]:
    """The mean of each quarter of the run in megabytes, for the processes that were there all along."""
    names = set.intersection(*(set(sample) for sample in memory))
    size = len(memory) / 4
    parts = [memory[int(i * size) : int((i + 1) * size)] for i in range(4)]
    return {
        name: [round(sum(sample[name] for sample in part) / len(part) / 1e6, 1) for part in parts]
        for name in sorted(names)
    }


def total(server: Server, series: str) -> float:
    lines = server.get("/metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series + "{"))


def drafts_and_accepted(server: Server) -> tuple[float, float]:
    prefix = "vllm:spec_decode_num_"
    return total(server, f"{prefix}drafts_total"), total(server, f"{prefix}accepted_tokens_total")


def objections(found: dict[str, Any], state: Soak) -> list[str]:
    """What is wrong with the result."""
    wrong = list(state.failures[:5])
    for name, sizes in found["megabytes_by_quarter"].items():
        if sizes[3] > GROWTH * sizes[2] + SLACK / 1e6:
            wrong.append(f"{name} grows: {sizes} MB by quarter of the run")
    if "audited" not in found:
        return wrong
    first, second = found["accepted_a_draft_by_half"]
    if second < LEAST_KEPT * first:
        wrong.append(f"acceptance decays: {first} accepted tokens a draft in the first half, {second} in the second")
    if not found["audited"] or found["largest_difference"] > AUDIT_LIMIT:
        wrong.append(f"the audit found {found['largest_difference']} in {found['audited']} requests")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="for each number of ranks")
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--plain", action="store_true", help="without speculation, to compare the memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = ROOT / "build" / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    requests, expected = greedy_requests(folder)
    rows, failed = [], False
    for ranks in map(int, args.ranks.split(",")):
        state = Soak(requests, expected)
        speculation = [] if args.plain else ["--speculative-config", json.dumps(SPECULATION)]
        with serve(PAIR / "target", *ENGINE, *speculation, "--tensor-parallel-size", str(ranks)) as server:
            found = asyncio.run(soak(server, args.requests, args.concurrency, state, not args.plain))
        wrong = objections(found, state)
        failed |= bool(wrong)
        rows.append({"ranks": ranks, "requests": args.requests, "concurrency": args.concurrency} | found)
        print(json.dumps(rows[-1], indent=2), *wrong, sep="\n", flush=True)
        if args.json:
            write(args.json, surroundings() | {"rows": rows})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
