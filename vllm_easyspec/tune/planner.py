"""Which plans are worth measuring, and what the measurements mean for each batch size. Pure functions of numbers.

A group's cost is what it loses by running side by side (`fidelity.py`); the costs of a plan's groups add up. Dynamic
programming gives the cheapest plan for each number of groups, and so for each number of sequential steps. A round of K
drafts takes `calibrate(K) + (K - 1) * step + verify(K)` and yields `1 + sum of the acceptance at positions 1 to K`
tokens per request. Acceptance is measured at the largest K, where text that is easy to draft takes few rounds and so
counts little; at a smaller K it counts more, which is corrected for all plans by one plan's measured tokens per round.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_easyspec.drafter.plan import DraftPlan, Scope

# The cost of each group of at least 2 layers, by first layer and size. A single layer costs nothing.
GroupCosts = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Point:
    """A candidate for a batch size: plan, K and maps. K = 0 drafts nothing."""

    plan: DraftPlan
    num_drafts: int
    lookahead: bool | None = None  # with look-ahead maps or without; None: as configured

    def __str__(self) -> str:
        maps = ", maps" if self.lookahead else ""
        return f"{self.plan}{maps}, K={self.num_drafts}" if self.num_drafts > 1 else f"K={self.num_drafts}"


@dataclass
class StageTimes:
    """Median milliseconds of the stages of a round at one batch size."""

    calibrate: dict[int, float]  # by K
    verify: dict[int, float]  # by K
    step: dict[DraftPlan, float]  # one fuzzy step
    other: float  # of a round, outside the stages: scheduling, preparing inputs, output

    def round_ms(self, point: Point, with_other: bool) -> float:
        """A round's time; between the measured K, times are interpolated."""
        num_drafts = point.num_drafts
        stages = _between(self.calibrate, num_drafts) + _between(self.verify, num_drafts)
        return stages + max(0, num_drafts - 1) * self.step[point.plan] + (self.other if with_other else 0.0)


def plan_cost(plan: DraftPlan, costs: GroupCosts) -> float:
    """What a plan loses: the sum of its groups' costs."""
    return sum(costs[group.start, len(group)] for group in plan.groups if len(group) > 1)


def best_plans(num_layers: int, costs: GroupCosts, scope: Scope) -> list[DraftPlan]:
    """For each number of groups the plan of the lowest cost, from the precise plan to the fewest groups.

    Plans that cost as much as one with fewer groups are left out, and so are groups that `costs` lacks.
    """
    # best[end]: by number of groups, the cheapest way to group the layers before `end`
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{} for _ in range(num_layers + 1)]
    best[0][0] = (0.0, ())
    for end in range(1, num_layers + 1):
        for size in range(1, end + 1):
            own = 0.0 if size == 1 else costs.get((end - size, size))
            if own is None:
                continue
            for groups, (cost, sizes) in best[end - size].items():
                found = (cost + own, (*sizes, size))
                if groups + 1 not in best[end] or found < best[end][groups + 1]:
                    best[end][groups + 1] = found
    kept: list[tuple[float, tuple[int, ...]]] = []
    for _, (cost, sizes) in sorted(best[num_layers].items()):  # fewest groups first
        if not kept or cost < kept[-1][0]:
            kept.append((cost, sizes))
    return [DraftPlan(sizes, scope) for _, sizes in reversed(kept)]


def most_promising(plans: Sequence[DraftPlan], costs: Mapping[DraftPlan, float], count: int) -> list[DraftPlan]:
    """At most `count` of the plans, those with the highest guessed rates first."""
    return sorted(plans, key=lambda plan: _guessed_rate(plan, costs[plan]), reverse=True)[:count]


def _guessed_rate(plan: DraftPlan, cost: float) -> float:
    """Tokens over sequential steps at the best K, good enough to rank plans by before anything was measured.

    Assumes that the target accepts a precise draft with probability 0.7, and a fuzzy one with `1 - cost` of that, and
    that verification takes as long as calibration.
    """
    target, kept = 0.7, 1 - min(1.0, cost)
    calibrate = verify = 2 * plan.num_layers
    tokens, best = 1 + target, 0.0
    for num_drafts in range(2, 9):
        tokens += target**num_drafts * kept ** (num_drafts - 1)
        best = max(best, tokens / (calibrate + verify + (num_drafts - 1) * plan.sequential_steps))
    return best


def tokens_a_round(acceptance: Sequence[float], num_drafts: int) -> float:
    """Tokens that a request gains in a round; acceptance: by position, the share of rounds that reached it."""
    return 1 + sum(acceptance[:num_drafts])


def predicted_rate(
    point: Point,
    batch_size: int,
    times: StageTimes,
    acceptance: Mapping[DraftPlan, Sequence[float]],
    correction: Mapping[int, float],
    with_other: bool,
) -> float:
    """Tokens per second of `batch_size` requests. correction: by K, real tokens per round over those by acceptance."""
    tokens = tokens_a_round(acceptance[point.plan], point.num_drafts) * _between(correction, point.num_drafts)
    return 1e3 * batch_size * tokens / times.round_ms(point, with_other)


def choose(rates: Mapping[int, Mapping[Point, float]], tolerance: float) -> dict[int, Point]:
    """The point to run at each batch size: the fastest.

    If the next smaller batch size's point is within `tolerance` of the fastest, as a share of it, that point is kept:
    the difference is noise, and fewer ranges are easier to read.
    """
    chosen: dict[int, Point] = {}
    previous: Point | None = None
    for batch_size, measured in sorted(rates.items()):
        best = max(measured, key=lambda point: measured[point])
        if previous is not None and measured.get(previous, 0.0) >= (1 - tolerance) * measured[best]:
            best = previous
        chosen[batch_size] = previous = best
    return chosen


@dataclass(frozen=True)
class Range:
    """Batch sizes from above the range before to `up_to`; the last range has no end."""

    up_to: int | None
    point: Point


def ranges(chosen: Mapping[int, Point]) -> list[Range]:
    """Batch sizes between two measured ones take the larger one's choice; larger ones take the last one's."""
    ascending = sorted(chosen.items())
    merged = [
        Range(size, point) for (size, point), (_, following) in itertools.pairwise(ascending) if point != following
    ]
    return [*merged, Range(None, ascending[-1][1])]


def _between(times: Mapping[int, float], num_drafts: int) -> float:
    measured = sorted(times)
    return float(np.interp(num_drafts, measured, [times[k] for k in measured]))
