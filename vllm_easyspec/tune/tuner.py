"""`vllm-easyspec tune`: measure, search, confirm, compare.

1. *score*: what each group of layers loses (`fidelity.py`), which gives the best plan for each number of sequential
   steps (`planner.py`), in both scopes.
2. *acceptance*: the most promising plans answer all prompts at the largest K; acceptance by position predicts what
   any smaller K would yield.
3. *times*: with requests running, plans and K take turns: calibration, fuzzy step and verification by batch size.
4. *confirm*: the plans that 2 and 3 predict to be fastest, each at its best K, the untuned configuration and K = 0
   answer the same prompts in turn, each at its own K.
5. *climb*: from the fastest of these to one draft more or less, as long as that is faster. The fastest is chosen for
   each batch size.
6. *compare*: the tuned configuration as it is served, the untuned one, vLLM's `draft_model` and no speculation, each in
   its own engine.

When time runs out or the user interrupts, what was measured so far is used.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_easyspec import support
from vllm_easyspec.bench.llm import bind_cpus, changed
from vllm_easyspec.config import EasySpecConfig, load
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan
from vllm_easyspec.drafter.vocabulary import DraftVocabulary
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.tune.options import TuneOptions
from vllm_easyspec.tune.planner import (
    Point,
    Range,
    StageTimes,
    best_plans,
    choose,
    most_promising,
    plan_cost,
    predicted_rate,
    ranges,
    tokens_a_round,
)
from vllm_easyspec.tune.progress import Progress
from vllm_easyspec.tune.requests import WARM_ROUNDS, AskedEngine, Prompt, TunedEngine, Window
from vllm_easyspec.tune.trials import Confirmed, Observation, Pair, Trials, confirmed, in_turn

SCORED_PROMPTS, SCORED_TOKENS = 8, 128
CONFIRMED = 3  # plans at each batch size, in addition to the untuned one and K = 0
CLIMBS = 3  # steps of K at each batch size
TOLERANCE = 0.02  # of a rate: smaller differences are noise
BETWEEN_ENGINES = 0.05  # the same for rates of engines one after another
ARMS = {"draft_model": "vLLM's draft_model", "none": "no speculation"}


@dataclass
class Findings:
    """Everything that was measured so far."""

    num_layers: int
    untuned: dict[int, Point]  # by batch size
    by_wall: bool  # whether choices rest on wall-clock rates, or on those of the stages only
    costs: dict[DraftPlan, float] = field(default_factory=dict)  # the scores of the searched plans
    acceptance: dict[DraftPlan, list[float]] = field(default_factory=dict)  # by position
    correction: dict[int, float] = field(default_factory=dict)  # by K, see `planner.py`
    coverage: float | None = None  # by `draft_vocabulary`, of the tokens of the answers
    same_answers: bool | None = None  # of all plans, token for token; None if answers are sampled
    times: dict[int, StageTimes] = field(default_factory=dict)  # by batch size
    confirmed: dict[int, dict[Point, Confirmed]] = field(default_factory=dict)  # by batch size
    baselines: dict[str, dict[int, float]] = field(default_factory=dict)  # by batch size: tokens per second, wall-clock
    failed: dict[str, str] = field(default_factory=dict)  # baselines whose engine did not start or died, and why
    unfinished: list[str] = field(default_factory=list)

    def predicted(self, batch_size: int) -> dict[Point, float]:
        """Tokens per second of every plan whose acceptance and time are known, at every K.

        Up to K = 1 there is no fuzzy step, so plans don't differ and only one is listed.
        """
        times = self.times[batch_size]
        untuned = self.untuned[batch_size].plan
        return {
            point: predicted_rate(point, batch_size, times, self.acceptance, self.correction, self.by_wall)
            for plan, acceptance in self.acceptance.items()
            if plan in times.step
            for point in (Point(plan, k) for k in range(0 if plan == untuned else 2, len(acceptance) + 1))
        }

    def rates(self, batch_size: int) -> dict[Point, float]:
        """The tokens per second for the choice: confirmed ones if there are any, else predicted ones."""
        if batch_size not in self.confirmed:
            return self.predicted(batch_size)
        seen = self.confirmed[batch_size]
        return {point: one.wall_rate if self.by_wall else one.stage_rate for point, one in seen.items()}

    def neighbours(self, batch_size: int) -> list[Point]:
        """The fastest confirmed point and its plan with one draft more and one less, unless they are confirmed already.

        Empty if there is nothing left to try, or nothing to climb from: no point is confirmed, or K = 0 is the fastest.
        """
        seen = self.confirmed.get(batch_size, {})
        rates = self.rates(batch_size)
        best = max(rates, key=lambda point: rates[point])
        max_drafts = max(len(acceptance) for acceptance in self.acceptance.values())
        plans = {1: self.untuned[batch_size].plan}  # as in `predicted`
        drafts = [k for k in (best.num_drafts - 1, best.num_drafts + 1) if 0 < k <= max_drafts]
        unseen = [point for point in (Point(plans.get(k, best.plan), k) for k in drafts) if point not in seen]
        return [best, *unseen] if seen and best.num_drafts and unseen else []

    def chosen(self) -> dict[int, Point]:
        return choose({size: self.rates(size) for size in self.times}, TOLERANCE)

    def ranges(self) -> list[Range]:
        return ranges(self.chosen())

    def warnings(self) -> list[str]:
        """Where a baseline was faster than the tuned engine by more than noise.

        The untuned configuration is left out: it was confirmed in turn with the tuned one, which is more exact.
        """
        tuned = self.baselines.get("tuned", {})
        return [
            f"at batch size {size} {ARMS[name]} was faster by wall-clock: {rates[size]:.1f} tokens/s, tuned {rate:.1f}"
            for size, rate in tuned.items()
            for name, rates in self.baselines.items()
            if name in ARMS and rates.get(size, 0.0) > (1 + BETWEEN_ENGINES) * rate
        ]


class Tuner:
    """Runs the phases on real engines."""

    def __init__(self, engine_args: EngineArgs, options: TuneOptions, prompts: list[Prompt]):
        """engine_args: the target and other arguments for vLLM, without a speculative configuration.

        Raises `ConfigError` for a configuration that can't be used.
        """
        self.options, self.prompts = options, prompts
        self.batch_sizes = sorted(set(options.batch_sizes))
        self.config = EasySpecConfig.parse(options.config)
        self.config.check_model()
        least = max(2, self.config.num_speculative_tokens)  # the configuration is measured too
        self.max_drafts = options.max_drafts or max(8, least)
        if self.max_drafts < least:
            raise ConfigError(f"max_drafts={self.max_drafts} is not allowed. Give at least {least}")
        shape = support.read_drafter(self.config.model, self.config.revision, self.config.code_revision)
        self.vocab_size = shape.vocab_size
        untuned = {size: configured(self.config, size, shape.num_layers) for size in self.batch_sizes}
        by_wall = options.rate == "wall" if options.rate else not current_platform.is_cpu()
        self.found = Findings(shape.num_layers, untuned, by_wall)
        largest = max(self.batch_sizes)
        self.trials = Trials(prompts, largest, self.max_drafts, options.new_tokens, options.temperature)
        bind_cpus(engine_args.tensor_parallel_size)
        self.engine_args = changed(engine_args, max_num_seqs=largest, disable_log_stats=True, use_tqdm_on_load=False)
        self.observed: dict[tuple[int, Point], list[Pair]] = defaultdict(list)  # started, by batch size
        self.progress = Progress(options.time_budget)
        self.found.unfinished = self.progress.unfinished

    # ---- the phases ----

    def tune(self) -> Findings:
        """Phases 1 to 5. Ends early if time runs out or the user interrupts; `Findings.unfinished` says what was left
        out."""
        config = load(self.options.config) | {"num_speculative_tokens": self.max_drafts}
        try:
            with TunedEngine(changed(self.engine_args, speculative_config=config)) as engine:
                self.start_seconds = self.progress.now() - self.progress.began
                self._check_room(engine.llm.model_config.max_model_len)
                self._measure_acceptance(engine, self._search(engine))
                self._measure_times(engine)
                self._confirm(engine)
                self._climb(engine)
        except KeyboardInterrupt:
            self.progress.interrupt()
        except (ConfigError, RuntimeError) as error:  # such as a cache too small for the largest batch size
            if not self.found.times:
                raise
            self.progress.give_up(str(error))
        if not self.found.times:
            raise ConfigError(f"nothing to choose from was measured ({'; '.join(self.found.unfinished)})")
        return self.found

    def compare(self, tuned: Path) -> None:
        """Phase 6, with the tuned configuration in the file `tuned`."""
        speculative: dict[str, Any] = {
            "tuned": load(tuned),
            "untuned": load(self.options.config),
            "draft_model": self.config.draft_model(),
            "none": None,
        }
        arms = [name for name in speculative if name == "tuned" or name in self.options.baselines]
        if not self.options.baselines or self.progress.interrupted:
            return
        try:
            for name in self.progress.within("compare", arms, 0, 1.2 * self.start_seconds):
                self._run_arm(name, speculative[name])
        except KeyboardInterrupt:
            self.progress.interrupt()

    def _check_room(self, max_model_len: int) -> None:
        if self.trials.longest > max_model_len:
            raise ConfigError(
                f"max_model_len={max_model_len} is too short for what is measured after a prompt: "
                f"{self.trials.longest} are needed. Give more, or less prompt_tokens, new_tokens or batch sizes"
            )

    def _search(self, engine: TunedEngine) -> list[DraftPlan]:
        """The untuned plans, the precise one, and the best for each number of steps, the most promising first."""
        sums: dict[Any, dict[tuple[int, int], float]] = {scope: defaultdict(float) for scope in SCOPES}
        prompts = [prompt["prompt_token_ids"][:SCORED_TOKENS] for prompt in self.prompts[:SCORED_PROMPTS]]
        largest, scored = min(self.options.max_group, self.found.num_layers), 0
        for ids in self.progress.within("score", prompts):
            for scope in SCOPES:
                for start, size, cost in engine.rpc("easyspec_group_costs", ids, scope, largest):
                    sums[scope][start, size] += cost
            scored += 1
        for scope in SCOPES:
            costs = {group: total / scored for group, total in sums[scope].items()}
            for plan in best_plans(self.found.num_layers, costs, scope):
                if not plan.is_precise:
                    self.found.costs[plan] = plan_cost(plan, costs)
        precise = DraftPlan.precise(self.found.num_layers)
        searched = most_promising(list(self.found.costs), self.found.costs, self.options.plans)
        return list(dict.fromkeys([*(point.plan for point in self.found.untuned.values()), precise, *searched]))

    def _measure_acceptance(self, engine: TunedEngine, plans: list[DraftPlan]) -> None:
        expected = None
        params = self.trials.params.clone()
        params.max_tokens = self.options.new_tokens
        self.found.correction = {0: 1.0, self.max_drafts: 1.0}
        points = [Point(plan, self.max_drafts) for plan in plans]
        points[1:1] = [Point(plans[0], k) for k in self._fewer_drafts() if k]
        for point in self.progress.within("acceptance", points):
            engine.use(point)
            answers = engine.answer(self.prompts, params)
            stats = engine.rpc("easyspec_stats")
            if self.found.coverage is None:
                self.found.coverage = self._coverage(engine, answers)
            if point.num_drafts == self.max_drafts:
                self.found.acceptance[point.plan] = stats["acceptance"]
            else:
                by_acceptance = tokens_a_round(self.found.acceptance[point.plan], point.num_drafts)
                self.found.correction[point.num_drafts] = stats["tokens_a_round"] / by_acceptance
            if self.options.temperature == 0:
                expected = expected or answers
                self.found.same_answers = answers == expected and self.found.same_answers is not False

    def _coverage(self, engine: TunedEngine, answers: list[list[int]]) -> float | None:
        if self.config.draft_vocabulary is None:
            return None
        special = support.special_tokens(engine.llm.model_config)
        vocabulary = DraftVocabulary.of(self.config.draft_vocabulary, special, self.vocab_size)
        return vocabulary.share_of(answers)[0] if vocabulary else 1.0

    def _fewer_drafts(self) -> list[int]:
        """The K, in addition to the largest, at which times that depend on K are measured; others are interpolated."""
        return sorted({0, 1, 2, self.max_drafts // 2} - {self.max_drafts})

    def _measure_times(self, engine: TunedEngine) -> None:
        plans = list(self.found.acceptance)
        points = [Point(plan, self.max_drafts) for plan in plans]
        points += [Point(plans[0], k) for k in self._fewer_drafts()]
        seen: dict[tuple[int, Point], list[Observation]] = defaultdict(list)
        sweeps = [(turn, size) for turn in range(self.options.turns) for size in self.batch_sizes]

        def go_on() -> Window:
            return engine.run_rounds(self.options.rounds)

        for turn, size in self.progress.within("times", sweeps):
            engine.abort_requests()
            for point in in_turn(points, turn):
                self._make_room(engine, size, turn)
                seen[size, point].append(Observation.of(*engine.measure(point, go_on)))
            self.found.times[size] = _stage_times({point: seen[size, point] for point in points}, self.max_drafts)

    def _make_room(self, engine: TunedEngine, size: int, turn: int) -> None:
        """Start requests if none are running, or if one could end within the next measurement."""
        next_takes = (WARM_ROUNDS + self.options.rounds) * (self.max_drafts + 1)
        if not engine.generated or max(engine.generated.values()) + next_takes >= self.trials.params.max_tokens:
            engine.start_requests(self.trials.batch(size, turn), self.trials.params)

    def _confirm(self, engine: TunedEngine) -> None:
        points = self._worth_confirming()
        turns = [(turn, size) for turn in range(self.options.turns) for size in self.found.times]
        for turn, size in self.progress.within("confirm", turns):
            self._run_trials(engine, size, points[size], turn)

    def _worth_confirming(self) -> dict[int, list[Point]]:
        """By batch size: plans predicted to be fastest, the smaller size's best, the untuned one and K = 0."""
        points: dict[int, list[Point]] = {}
        smaller: list[Point] = []
        for size in self.found.times:
            rates = self.found.predicted(size)
            fastest: dict[DraftPlan, Point] = {}  # each plan's best K
            for point in sorted((p for p in rates if p.num_drafts), key=lambda point: rates[point], reverse=True):
                fastest.setdefault(point.plan, point)
            best = list(fastest.values())[:CONFIRMED]
            untuned = self.found.untuned[size]
            points[size] = list(dict.fromkeys([*best, *smaller, untuned, Point(untuned.plan, 0)]))
            smaller = best[:1]
        return points

    def _climb(self, engine: TunedEngine) -> None:
        """Measure the fastest point again together with its neighbours."""
        for _, size in self.progress.within("climb", list(product(range(CLIMBS), self.found.confirmed)), minimum=0):
            if points := self.found.neighbours(size):
                for turn in range(self.options.turns):
                    self._run_trials(engine, size, points, turn)

    def _run_trials(self, engine: TunedEngine, size: int, points: list[Point], turn: int) -> None:
        reference = self.found.untuned[size]
        points = points if reference in points else [*points, reference]
        for point, pair in self.trials.compare(engine, size, points, turn, reference):
            self.observed[size, point].append(pair)
        confirmed_so_far = self.found.confirmed.setdefault(size, {})
        confirmed_so_far.update({point: confirmed(size, self.observed[size, point]) for point in points})

    def _run_arm(self, name: str, speculative_config: dict[str, Any] | None) -> None:
        """Tokens per second of one engine at each batch size."""
        arguments, turns = changed(self.engine_args, speculative_config=speculative_config), self.options.turns
        try:
            with AskedEngine(arguments, in_process=False) as engine:
                rates = {size: self.trials.wall_rate(engine, size, turns) for size in self.found.times}
        except (RuntimeError, ValueError, EngineDeadError) as error:  # continue with the others
            self.found.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            self.found.baselines[name] = rates


def configured(config: EasySpecConfig, batch_size: int, num_layers: int) -> Point:
    """What a configuration does at a batch size."""
    return Point(config.layer_parallel.plan_table(num_layers).at(batch_size), config.num_drafts_at(batch_size))


def _stage_times(seen: dict[Point, list[Observation]], max_drafts: int) -> StageTimes:
    """Medians over turns. Times by K are of the points with the first plan; a step's are those at the largest K."""

    def typical(point: Point, stage: str) -> float:
        return median(one.stage_ms[stage] for one in seen[point])

    first = next(iter(seen)).plan
    by_k = [point for point in seen if point.plan == first]
    others = [one.window.wall_ms - sum(one.stage_ms.values()) for turns in seen.values() for one in turns]
    return StageTimes(
        calibrate={point.num_drafts: typical(point, "calibrate") for point in by_k},
        verify={point.num_drafts: typical(point, "verify") for point in by_k},
        step={p.plan: typical(p, "draft") / (max_drafts - 1) for p in seen if p.num_drafts == max_drafts},
        other=median(others),
    )
