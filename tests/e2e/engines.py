"""Real engines for the end-to-end tests: one at a time, each shared by as many tests as can use it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "examples" / "tiny-pair" / "target"
DRAFTER = ROOT / "examples" / "tiny-pair" / "drafter"

AUDIT_LIMIT = 1e-4  # float32; the tiny drafter's keys are of order 1 to 10

SOURCES = (
    "def main(argv):\n    parser = ",
    "import os\nimport sys\n\n",
    "class Connection:\n    def __init__(self, host, port):\n",
    "try:\n    value = int(text)\nexcept ValueError:\n",
    "# Copyright (c)",
    'if __name__ == "__main__":\n',
    "    return self._",
    "for key, value in ",
)

REQUESTS = {  # more options of requests
    "penalties": dict(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    "bad-words": dict(bad_words=["list", "self"]),
    "stop": dict(stop=[" of", "):"]),
    "min-tokens": dict(ignore_eos=False, min_tokens=30, stop_token_ids=[200, 222]),
    "logprobs": dict(logprobs=3, prompt_logprobs=2),
}


def mixed_prompts() -> list[str]:
    """16 prompts from a few tokens to a few hundred."""
    return [source * repeats for repeats in (1, 5) for source in SOURCES]


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**(dict(temperature=0, max_tokens=max_tokens, ignore_eos=True) | changes))


def token_ids(llm: LLM, prompts: list[str], params: Any) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]


def prompts_near_the_end(llm: LLM | AsyncLLM) -> list[dict]:
    """Prompts that leave from 1 to 16 tokens before the engine's longest sequence."""
    ids = [token for prompt in mixed_prompts() for token in llm.get_tokenizer()(prompt)["input_ids"]]
    longest = llm.model_config.max_model_len
    return [{"prompt_token_ids": ids[: longest - room]} for room in (1, 2, 3, 5, 7, 16)]


def answers(llm: LLM, changes: dict) -> list[tuple]:
    """Token ids, text, reason of the end, and the log-probabilities where asked for."""
    outs = llm.generate(mixed_prompts(), greedy(40, **changes), use_tqdm=False)
    found = []
    for out in outs:
        best = out.outputs[0]
        steps = (best.logprobs or []) + [step for step in out.prompt_logprobs or [] if step]
        values = [(token, round(entry.logprob, 3)) for step in steps for token, entry in sorted(step.items())]
        found.append((list(best.token_ids), best.text, best.finish_reason, values))
    return found


ENGINE: dict[str, Any] = dict(  # small pages, and float32 so that greedy outputs can be compared token for token
    dtype="float32",
    max_model_len=384,
    max_num_seqs=16,
    max_num_batched_tokens=192,
    block_size=32,
    num_gpu_blocks_override=72,
    kv_cache_memory_bytes=1 << 28,
    enforce_eager=True,
    disable_log_stats=False,
)


@contextmanager
def engine(model: Path = TARGET, **arguments: Any) -> Iterator[LLM]:
    """An offline engine."""
    elsewhere = json.loads(os.environ.get("EASYSPEC_TEST_ENGINE", "{}"))  # what a GPU needs: tools/gpu_check.py
    llm = LLM(str(model), **(ENGINE | elsewhere | arguments))
    try:
        yield llm
    finally:
        # Its processes never end by themselves within vLLM's five seconds, and are killed then. They hold nothing.
        llm.llm_engine.engine_core.shutdown(timeout=0.1)


def easyspec(drafter: Path = DRAFTER, **changes: Any) -> dict[str, Any]:
    """A configuration for `LLM(speculative_config=...)` in which every rank checks the others."""
    return {
        "method": "easyspec",
        "model": str(drafter),
        "num_speculative_tokens": 8,
        "check_ranks": True,
    } | changes


def configure(llm: LLM, **changes: Any) -> None:
    llm.collective_rpc("easyspec_configure", kwargs=changes)


def stats(llm: LLM, reset: bool = False) -> list[dict]:
    """Each rank's counters."""
    return llm.collective_rpc("easyspec_stats", kwargs={"reset": reset})


def audit(llm: LLM) -> list[dict]:
    """The audit of all ranks in one list."""
    return [request for rank in llm.collective_rpc("easyspec_audit") for request in rank]


def audited(llm: LLM, prompts: list[Any], max_tokens: int | list[int] = 60, every: int = 4) -> list[float]:
    """The audit's difference for each live request on each rank, every few steps while `prompts` are answered."""
    core, found, step = llm.llm_engine, [], 0
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        core.add_request(f"audited-{index}", prompt, greedy(length))
    while core.has_unfinished_requests():
        core.step()
        step += 1
        if step % every == 0:
            found += [request["largest_difference"] for request in audit(llm)]
    assert len(found) > len(prompts)
    return found


def assert_some_accepted(llm: LLM) -> None:
    counted = stats(llm)[0]
    assert counted["accepted_at"][0] > 0.3 * counted["verified"] > 0


def assert_precise(llm: LLM, prompts: list[Any]) -> None:
    assert max(audited(llm, prompts)) < AUDIT_LIMIT


def assert_same_output_by_many_drafts(llm: LLM, expected: list[list[int]], scope: str) -> None:
    """expected: of 60 tokens each."""
    configure(llm, scope=scope, plan="1-4-4-1", num_speculative_tokens=5)
    assert token_ids(llm, mixed_prompts(), greedy(60)) == expected
    assert_some_accepted(llm)
    assert stats(llm)[0]["accepted_at"][4] > 0


def assert_precise_mid_flight(llm: LLM) -> None:
    """Also while prompts are read in chunks and 8 tokens are drafted by one long group."""
    configure(llm, scope="block", plan="1-8-1", num_speculative_tokens=8)
    llm.reset_prefix_cache()
    assert_precise(llm, mixed_prompts())


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)
