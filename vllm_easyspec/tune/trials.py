"""Trials: the same requests started anew for each point in turn, so that points are compared on the same text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm import SamplingParams

from vllm_easyspec.tune.planner import Point
from vllm_easyspec.tune.requests import WARM_ROUNDS, AskedEngine, Prompt, TunedEngine, Window

TRIALS_A_TURN = 15  # of one request in a turn, fewer of larger batches


@dataclass(frozen=True)
class Observation:
    """Rounds of one point."""

    window: Window
    stage_ms: dict[str, float]  # medians; 0 for a stage that did not run

    @classmethod
    def of(cls, window: Window, stats: dict[str, Any]) -> "Observation":
        return cls(window, {stage: took or 0.0 for stage, took in stats["stage_ms"].items()})

    @property
    def stages_ms(self) -> float:
        return sum(self.stage_ms.values())


# A point's observation of a trial, and the reference point's of the same trial.
Pair = tuple[Observation, Observation]


@dataclass
class Confirmed:
    """What a point did in its trials, over all turns."""

    tokens_a_round: float  # of one request, mean
    stage_ms: dict[str, float]  # typical, see `confirmed`
    wall_ms: float  # of a round, likewise
    stage_rate: float  # tokens per second of the stages' time alone
    wall_rate: float  # tokens per second


class Trials:
    """The requests that every point is measured on."""

    def __init__(self, prompts: Sequence[Prompt], largest: int, max_drafts: int, tokens: int, temperature: float = 0.0):
        """largest: batch size; max_drafts: K; tokens: that each request of a trial writes."""
        self.prompts = prompts
        self.tokens = tokens
        # Every request goes on until the slowest has its tokens, and the first to be read waits for the last.
        outlives = (largest + WARM_ROUNDS + tokens) * (max_drafts + 1)
        self.params = SamplingParams(
            temperature=temperature, max_tokens=1 + outlives, ignore_eos=True, detokenize=False
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its prompt included."""
        return max(len(prompt["prompt_token_ids"]) for prompt in self.prompts) + self.params.max_tokens

    def batch(self, size: int, trial: int) -> list[Prompt]:
        """`size` prompts, others each trial; from the start again where they run out."""
        return [self.prompts[(trial * size + index) % len(self.prompts)] for index in range(size)]

    def numbers(self, size: int, turn: int) -> range:
        """The trials of a turn."""
        count = -(-TRIALS_A_TURN // size)
        return range(turn * count, (turn + 1) * count)

    def compare(
        self, engine: TunedEngine, size: int, points: Sequence[Point], turn: int, reference: Point
    ) -> Iterator[tuple[Point, Pair]]:
        """A turn of each point on the same prompts; every other trial in the opposite order.

        reference: one of the points.
        """
        for trial in self.numbers(size, turn):
            seen: dict[Point, Observation] = {}
            for point in in_turn(points, trial):
                engine.start_requests(self.batch(size, trial), self.params)
                seen[point] = Observation.of(*engine.measure(point, lambda: engine.run_tokens(self.tokens)))
            yield from ((point, (observed, seen[reference])) for point, observed in seen.items())

    def wall_rate(self, engine: AskedEngine, size: int, turns: int) -> float:
        """Tokens per second of any engine, on the prompts that `compare` takes."""
        windows = []
        for trial in (number for turn in range(turns) for number in self.numbers(size, turn)):
            engine.start_requests(self.batch(size, trial), self.params)
            engine.run_rounds(WARM_ROUNDS)
            windows.append(engine.run_tokens(self.tokens))
        return 1e3 * size * _tokens_a_round(windows) / median(window.wall_ms for window in windows)


def in_turn(points: Sequence[Point], turn: int) -> Sequence[Point]:
    """Every other turn goes the other way, so that drift meets all alike."""
    return points if turn % 2 == 0 else list(reversed(points))


def confirmed(size: int, seen: Sequence[Pair]) -> Confirmed:
    """Times are medians of ratios to the reference in the same trial, times its own median.

    A shared machine has slow and fast minutes; a trial takes a second or two, so most of that cancels.
    """
    tokens = _tokens_a_round([one.window for one, _ in seen])
    stages = median(reference.stages_ms for _, reference in seen)
    wall = median(reference.window.wall_ms for _, reference in seen)
    stage_ms = {
        stage: stages * median(one.stage_ms[stage] / reference.stages_ms for one, reference in seen)
        for stage in seen[0][0].stage_ms
    }
    wall_ms = wall * median(one.window.wall_ms / reference.window.wall_ms for one, reference in seen)
    return Confirmed(
        tokens_a_round=tokens,
        stage_ms=stage_ms,
        wall_ms=wall_ms,
        stage_rate=1e3 * size * tokens / sum(stage_ms.values()),
        wall_rate=1e3 * size * tokens / wall_ms,
    )


def _tokens_a_round(windows: Sequence[Window]) -> float:
    return sum(window.tokens for window in windows) / sum(window.request_rounds for window in windows)
