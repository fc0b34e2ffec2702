"""A streaming client inside the process, and what it measures: tokens per second, TTFT, TPOT, ITL.

vLLM's synchronous engine returns each step's tokens, so it streams without a server or an event loop, whose time would
be measured with the engine's on a machine with few cores. Definitions are those of vLLM's `bench
serve` (`vllm/benchmarks/serve.py`, `calculate_metrics`).
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass
class Answer:
    """One request's tokens, and the times of their arrival, in seconds of `time.perf_counter`."""

    submitted: float
    arrivals: list[float] = field(default_factory=list)  # one per streamed chunk; a round's tokens are one chunk
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to first token: the first chunk's."""
        return self.arrivals[0] - self.submitted

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: between chunks."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


@dataclass
class Level:
    """All requests of one concurrency in one turn of an engine."""

    answers: list[Answer]
    seconds: float  # from the first request to the last token

    @property
    def tokens_a_second(self) -> float:
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def outputs(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]


def serve(engine: Any, prompts: Sequence[list[int]], concurrency: int, output_tokens: int) -> Level:
    """Answer all prompts greedily, `concurrency` of them at a time, `output_tokens` each. engine: an `LLMEngine`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    answers: list[Answer] = []
    waiting, running = deque(prompts), 0
    began = time.perf_counter()
    while waiting or running:
        while waiting and running < concurrency:
            answers.append(Answer(time.perf_counter()))
            engine.add_request(str(len(answers) - 1), {"prompt_token_ids": waiting.popleft()}, params)
            running += 1
        outputs = engine.step()
        now = time.perf_counter()
        for out in outputs:
            if new := out.outputs[0].token_ids:
                answer = answers[int(out.request_id)]
                answer.arrivals.append(now)
                answer.tokens += new
            running -= out.finished
    return Level(answers, time.perf_counter() - began)


def summary(levels: Sequence[Level]) -> dict[str, Any]:
    """Figures of one arm at one concurrency over all its turns; latencies pooled, in milliseconds."""
    answers = [answer for level in levels for answer in level.answers]
    by_turn = [level.tokens_a_second for level in levels]
    return {
        "requests": len(answers),
        "tokens_a_second": round(float(np.median(by_turn)), 2),
        "tokens_a_second_by_turn": [round(value, 2) for value in by_turn],
        "ttft_ms": spread([answer.ttft for answer in answers]),
        "tpot_ms": spread([answer.tpot for answer in answers if answer.tpot is not None]),
        "itl_ms": spread([itl for answer in answers for itl in answer.itls]),
    }


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile, in milliseconds; None if nothing was measured."""
    if not seconds:
        return {"median": None, "p99": None}
    middle, high = np.percentile(seconds, [50, 99])
    return {"median": round(1e3 * float(middle), 3), "p99": round(1e3 * float(high), 3)}


def compare(expected: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, Any]:
    """How many outputs equal the expected ones, token for token, and the first difference."""
    if len(expected) != len(found):
        raise ValueError(f"{len(found)} outputs can't be compared with {len(expected)}")
    differing = [index for index, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    return {
        "equal": len(found) - len(differing),
        "of": len(found),
        "first_difference": _difference(differing[0], expected, found) if differing else None,
    }


def _difference(request: int, expected: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, Any]:
    pairs = list(zip(expected[request], found[request], strict=False))
    shorter = len(pairs)
    position = next((index for index, (wanted, got) in enumerate(pairs) if wanted != got), shorter)
    wanted, got = (
        tokens[position] if position < len(tokens) else None for tokens in (expected[request], found[request])
    )
    return {"request": request, "position": position, "expected": wanted, "found": got}
