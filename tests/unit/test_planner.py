"""The planner against brute force, on made-up tables."""

import itertools
import random
from dataclasses import replace

import pytest
from tiny_models import easyspec
from tune_findings import PLANS, findings

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.drafter.plan import DraftPlan
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
)
from vllm_easyspec.tune.tuner import configured

PRECISE = DraftPlan.precise(4)
HALVES = DraftPlan((2, 2), "block")
ONE = DraftPlan((4,), "block")


def partitions(num_layers: int):
    """Every plan: each border between two layers is there or not."""
    for borders in itertools.product([False, True], repeat=num_layers - 1):
        sizes = [1]
        for border in borders:
            if border:
                sizes.append(1)
            else:
                sizes[-1] += 1
        yield DraftPlan(tuple(sizes))


def random_costs(num_layers: int, largest: int, seed: int, integral: bool = False) -> dict[tuple[int, int], float]:
    """integral: small whole numbers, so that many plans cost the same."""
    rng = random.Random(seed)
    groups = [(start, size) for size in range(2, largest + 1) for start in range(num_layers - size + 1)]
    return {group: float(rng.randrange(4)) if integral else rng.random() * group[1] for group in groups}


@pytest.mark.parametrize("integral", [False, True])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("num_layers", "largest"), [(1, 1), (2, 2), (5, 5), (8, 8), (9, 4)])
def test_best_plans_are_the_best_of_all(num_layers, largest, seed, integral):
    costs = random_costs(num_layers, largest, seed, integral)
    found = {len(plan.group_sizes): plan for plan in best_plans(num_layers, costs, "block")}
    allowed = [plan for plan in partitions(num_layers) if max(plan.group_sizes) <= largest]
    lowest: float | None = None  # of the plans with fewer groups
    for groups in range(1, num_layers + 1):
        of_size = [plan_cost(plan, costs) for plan in allowed if len(plan.group_sizes) == groups]
        improves = bool(of_size) and (lowest is None or min(of_size) < lowest)
        assert (groups in found) == improves
        if improves:
            lowest = plan_cost(found[groups], costs)
            assert lowest == pytest.approx(min(of_size))
            assert found[groups].num_layers == num_layers


def test_plans_come_from_most_to_fewest_groups():
    plans = best_plans(6, random_costs(6, 6, 0), "block")
    assert plans[0].is_precise or plan_cost(plans[0], random_costs(6, 6, 0)) == 0
    assert [len(plan.group_sizes) for plan in plans] == sorted((len(plan.group_sizes) for plan in plans), reverse=True)


def test_most_promising():
    costs = {PRECISE: 0.0, HALVES: 0.2, ONE: 0.9}
    # Tokens over steps at K = 2: (1.7 + 0.49 * 0.8) / 20, (1.7 + 0.49 * 0.1) / 18, (1.7 + 0.49) / 24.
    assert most_promising([PRECISE, HALVES, ONE], costs, 9) == [HALVES, ONE, PRECISE]
    assert most_promising([PRECISE, HALVES, ONE], costs, 2) == [HALVES, ONE]
    for lost in (1.0, 3.0):
        assert most_promising([HALVES, ONE], {HALVES: lost, ONE: 5.0}, 1) == [ONE], "nobody loses more than all"


TIMES = StageTimes(
    calibrate={0: 1.0, 1: 1.5, 4: 3.0}, verify={0: 2.0, 1: 3.0, 4: 6.0}, step={PRECISE: 2.0, ONE: 0.5}, other=10.0
)


@pytest.mark.parametrize(
    ("point", "milliseconds"),
    [
        (Point(PRECISE, 0), 3.0),
        (Point(PRECISE, 1), 4.5),
        (Point(PRECISE, 2), 2.0 + 4.0 + 2.0),  # a third of the way from K = 1 to K = 4
        (Point(PRECISE, 4), 3.0 + 6.0 + 6.0),
        (Point(ONE, 4), 3.0 + 6.0 + 1.5),
    ],
)
def test_times_of_a_round(point, milliseconds):
    assert TIMES.round_ms(point, with_other=False) == pytest.approx(milliseconds)
    assert TIMES.round_ms(point, with_other=True) == pytest.approx(milliseconds + 10)


def test_predicted_rate():
    acceptance = {ONE: [0.5, 0.25, 0.25, 0.0]}
    # 3 requests gain 2 tokens each in 10.5 ms.
    assert predicted_rate(Point(ONE, 4), 3, TIMES, acceptance, {0: 1.0, 4: 1.0}, False) == pytest.approx(
        3 * 2 / 10.5e-3
    )
    # At K = 2 they would gain 1.75 by acceptance, and gain a tenth more.
    corrected = predicted_rate(Point(ONE, 2), 3, TIMES, acceptance, {0: 1.0, 2: 1.1, 4: 1.0}, False)
    assert corrected == pytest.approx(3 * 1.75 * 1.1 / 6.5e-3)
    assert predicted_rate(Point(ONE, 0), 3, TIMES, acceptance, {0: 1.0, 4: 1.0}, True) == pytest.approx(3 / 13e-3)


A, B, NOTHING = Point(ONE, 4), Point(HALVES, 2), Point(ONE, 0)


def test_choice_takes_the_fastest_but_stays_within_the_noise():
    rates = {
        1: {A: 100.0, B: 99.0, NOTHING: 50.0},
        2: {A: 199.0, B: 200.0, NOTHING: 100.0},  # A stays
        4: {A: 300.0, B: 380.0, NOTHING: 250.0},
        8: {A: 400.0, NOTHING: 401.0},  # B was not measured
    }
    assert choose(rates, 0.02) == {1: A, 2: A, 4: B, 8: NOTHING}
    assert choose(rates, 0.0) == {1: A, 2: B, 4: B, 8: NOTHING}


def test_ranges():
    assert ranges({1: A}) == [Range(None, A)]
    assert ranges({1: A, 2: A, 8: A}) == [Range(None, A)]
    assert ranges({1: A, 2: A, 4: B, 8: B, 16: NOTHING}) == [Range(2, A), Range(8, B), Range(None, NOTHING)]
    assert ranges({4: B, 1: A}) == [Range(1, A), Range(None, B)]


def test_what_a_configuration_does_at_a_batch_size():
    config = EasySpecConfig.parse(
        easyspec(
            num_speculative_tokens=5,
            num_speculative_tokens_per_batch_size=[[1, 4, 7], [8, 16, 3], [17, 64, 0]],
            layer_parallel={"group_size": 2, "by_batch_size": [{"up_to": 2, "scope": "block", "plan": "4"}]},
        )
    )
    points = {size: configured(config, size, 4) for size in (1, 2, 3, 5, 8, 17, 99)}
    assert [str(point) for point in points.values()] == [
        "block 4, K=5", "block 4, K=5", "attention 1-2-1, K=5", "attention 1-2-1, K=5", "attention 1-2-1, K=3", "K=0",
        "K=0",
    ]  # fmt: skip


def test_findings_predict_one_plan_up_to_k_1_and_prefer_what_was_confirmed():
    found = findings()
    found.confirmed.pop(16)
    small = [point for point in found.predicted(16) if point.num_drafts < 2]
    assert small == [Point(PLANS[1], 0), Point(PLANS[1], 1)], "the untuned plan stands for all"
    assert len(found.predicted(16)) == 2 + 7 * len(PLANS)
    assert found.rates(16) == found.predicted(16)
    assert set(found.rates(4)) == set(found.confirmed[4]) and found.rates(4) != found.predicted(4)
    stages = found.rates(4)
    found.by_wall = True
    assert found.rates(4) == {point: pytest.approx(0.7 * rate) for point, rate in stages.items()}


def test_neighbours_of_the_fastest_until_it_is_the_top():
    found = findings()
    best = max((p for p in found.rates(4)), key=found.rates(4).get)
    assert best == Point(PLANS[4], 3)
    assert found.neighbours(4) == [best, Point(PLANS[4], 2), Point(PLANS[4], 4)]
    for point, faster in ((Point(PLANS[4], 4), 1.1), (Point(PLANS[4], 2), 0.9), (Point(PLANS[4], 5), 1.0)):
        seen = found.confirmed[4][best]
        found.confirmed[4][point] = replace(seen, stage_rate=faster * seen.stage_rate)
    assert found.neighbours(4) == [], "K = 4 beats 3 and 5"
    del found.confirmed[4][Point(PLANS[4], 5)]
    assert found.neighbours(4) == [Point(PLANS[4], 4), Point(PLANS[4], 5)]


def test_neighbours_at_the_ends():
    found = findings()
    seen = found.confirmed[1].popitem()[1]
    for k, beside in ((2, [1, 3]), (8, [7])):
        found.confirmed[1] = {Point(PLANS[4], k): seen}
        assert found.neighbours(1)[1:] == [Point(PLANS[1] if j == 1 else PLANS[4], j) for j in beside]
    found.confirmed[1] = {Point(PLANS[1], 0): seen}
    assert found.neighbours(1) == [], "K = 0 is the fastest"
    found.confirmed.clear()
    assert found.neighbours(1) == [], "nothing was confirmed"


def test_a_faster_engine_is_told():
    found = findings()
    assert found.warnings() == []
    found.baselines["none"][16] = 1.06 * found.baselines["tuned"][16]
    found.baselines["none"][4] = 1.04 * found.baselines["tuned"][4]  # between engines that much is noise
    found.baselines["untuned"][1] = 2 * found.baselines["tuned"][1]
    (warning,) = found.warnings()
    assert warning.startswith("at batch size 16 no speculation was faster by wall-clock: 581.9 tokens/s, tuned 548.9")
    found.baselines.clear()
    assert found.warnings() == []
