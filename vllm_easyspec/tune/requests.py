"""Real engines for tuning: requests keep running while plan and K change between rounds.

Only vLLM's scheduler can choose K: it verifies what it scheduled. So the engine that is tuned runs in this process,
where the scheduler's table of K by batch size (`num_speculative_tokens_per_batch_size`) can be changed between two
steps, and every K is measured as it would be served. Baselines run as usual, in their own processes.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_easyspec.bench.llm import Engine, changed
from vllm_easyspec.compat import scheduled_drafts
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.tune.planner import Point

WARM_ROUNDS = 2  # after a change of K: the first round still verifies drafts of the old one
Prompt = dict[str, list[int]]  # vLLM's form of a prompt of token ids


@dataclass(frozen=True)
class Window:
    """Some rounds of the running requests."""

    tokens: int  # that are counted, of all requests
    request_rounds: float  # rounds that the requests took for these tokens, summed over requests
    seconds: float
    rounds: int

    @property
    def wall_ms(self) -> float:
        """Milliseconds of a round."""
        return 1e3 * self.seconds / self.rounds


class AskedEngine(Engine):
    """An engine and the requests in it."""

    def __init__(self, engine_args: EngineArgs, in_process: bool):
        super().__init__(engine_args, in_process)
        self.names = itertools.count()
        self.generated: dict[str, int] = {}  # tokens of each running request

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[int]]:
        """The token ids of the answer to each prompt, with as many requests at a time as the engine takes."""
        names = [self._add(prompt, params) for prompt in prompts]
        answers: dict[str, list[int]] = {}
        while self.llm.has_unfinished_requests():
            answers |= {out.request_id: list(out.outputs[0].token_ids) for out in self.llm.step() if out.finished}
        self.generated.clear()
        return [answers[name] for name in names]

    def start_requests(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Replace the running requests by new ones, and run until each has been read and has a token.

        Raises `ConfigError` if the K/V cache is too small for them.
        """
        self.abort_requests()
        for prompt in prompts:
            self._add(prompt, params)
        while not all(self.generated.values()):
            self._step()

    def run_rounds(self, rounds: int) -> Window:
        """Continue the running requests, none of which may end within these rounds."""
        before = sum(self.generated.values())
        began = time.perf_counter()
        for _ in range(rounds):
            self._step()
        seconds, tokens = time.perf_counter() - began, sum(self.generated.values()) - before
        return Window(tokens, len(self.generated) * rounds, seconds, rounds)

    def run_tokens(self, tokens: int) -> Window:
        """Continue the running requests until each has generated `tokens` more; none may end before.

        A request counts until it has them, its last round in part: so requests that draft well and others have the
        same weight as in serving, where answers have a length, not a number of rounds.
        """
        start, request_rounds, rounds = dict(self.generated), 0.0, 0
        writing = set(start)
        began = time.perf_counter()
        while writing:
            before = dict(self.generated)
            self._step()
            rounds += 1
            for name in list(writing):
                wanted, gained = start[name] + tokens - before[name], self.generated[name] - before[name]
                request_rounds += min(1.0, wanted / gained) if gained else 1.0
                if gained >= wanted:
                    writing.remove(name)
        return Window(tokens * len(start), request_rounds, time.perf_counter() - began, rounds)

    def abort_requests(self) -> None:
        """Abort the running requests."""
        self.llm.abort_request(list(self.generated))
        self.generated.clear()
        while self.llm.has_unfinished_requests():
            self.llm.step()

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        name = str(next(self.names))
        self.llm.add_request(name, prompt, params)
        self.generated[name] = 0
        return name

    def _step(self) -> None:
        for out in self.llm.step():
            if out.finished:
                raise ConfigError(
                    f"batch size {len(self.generated)}: a request ended before all were read, so the K/V cache holds "
                    "fewer at once. Give vLLM more memory for it, or smaller batch_sizes"
                )
            self.generated[out.request_id] = len(out.outputs[0].token_ids)


class TunedEngine(AskedEngine):
    """An engine with easyspec in which any plan and any K up to the configured one can be used."""

    def __init__(self, engine_args: EngineArgs):
        """engine_args: with an easyspec `speculative_config` as a dict, and a `max_num_seqs`."""
        given: Any = engine_args.speculative_config
        config = {key.replace("-", "_"): value for key, value in given.items()}
        max_drafts = config["num_speculative_tokens"]
        # Each K belongs to some batch size, so that vLLM prepares each K at start (CUDA graphs).
        table = [[size, size, max_drafts + 1 - size] for size in range(1, max_drafts + 2)]
        plans = {name: value for name, value in (config.get("layer_parallel") or {}).items() if name != "by_batch_size"}
        engine_args = changed(
            engine_args,
            speculative_config={**config, "layer_parallel": plans, "num_speculative_tokens_per_batch_size": table},
            max_num_seqs=max(max_drafts + 1, engine_args.max_num_seqs or 1),
        )
        super().__init__(engine_args, in_process=True)
        self.num_drafts_by_batch_size: list[int] = scheduled_drafts(self.llm)

    def use(self, point: Point) -> None:
        """Draft this way from the next round on; resets the worker's counters."""
        self.num_drafts_by_batch_size[:] = [point.num_drafts] * len(self.num_drafts_by_batch_size)
        maps = {} if point.lookahead is None else {"lookahead": point.lookahead}
        self.rpc("easyspec_configure", scope=point.plan.scope, plan=point.plan.grouping, **maps)
        batch_sizes, drafts = [len(self.generated)], [point.num_drafts]
        self.rpc("easyspec_capture", batch_sizes=batch_sizes, num_speculative_tokens=drafts)

    def measure(self, point: Point, go_on: Callable[[], Window]) -> tuple[Window, dict[str, Any]]:
        """Continue the running requests at `point`. Returns the window and rank 0's counters.

        go_on: `run_rounds` or `run_tokens`. Raises RuntimeError if vLLM's scheduler did not use the K that was set.
        """
        self.use(point)
        self.run_rounds(WARM_ROUNDS)
        self.rpc("easyspec_stats", reset=True)
        window, stats = go_on(), self.rpc("easyspec_stats")
        drafted = {row["num_speculative_tokens"] for row in stats["rounds_by_plan"]}
        if drafted != {point.num_drafts}:
            raise RuntimeError(f"rounds were to draft {point.num_drafts} tokens, and drafted {sorted(drafted)}")
        return window, stats
