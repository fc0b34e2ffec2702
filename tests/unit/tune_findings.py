"""Made-up findings of a tuning run, for the report's tests."""

from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import Point, StageTimes, predicted_rate, tokens_a_round
from vllm_easyspec.tune.trials import Confirmed
from vllm_easyspec.tune.tuner import Findings

SIZES = (1, 4, 16)
PLANS = [
    DraftPlan.precise(10),
    *(
        DraftPlan(sizes, scope)
        for sizes in ((1, 4, 4, 1), (1, 3, 3, 2, 1), (1, 8, 1))
        for scope in ("attention", "block")
    ),
]
ABOUT = {
    "command": "vllm-easyspec tune --model a/target --config untuned.yaml -o 'tuned & true.yaml'",
    "commit": None,
    "versions": {"python": "3.11.9", "vllm": "0.32.0", "xformers": None},
    "hardware": {"cpu": "a <CPU>", "cores": 2, "gpu": None},
    "target": "a/target",
    "drafter": "a/drafter",
}


def findings() -> Findings:
    untuned = PLANS[1]
    found = Findings(10, {size: Point(untuned, 5) for size in SIZES}, by_wall=False, same_answers=True)
    found.costs = {plan: (20 - plan.sequential_steps) / 60 for plan in PLANS[1:]}
    found.correction = {0: 1.0, 2: 1.05, 8: 1.0}
    for plan in PLANS:
        own = 0.72 - found.costs.get(plan, 0.0) / 2
        found.acceptance[plan] = [round(own ** (position * 0.9), 4) for position in range(1, 9)]
    for size in SIZES:
        ms = 1 + size / 8
        found.times[size] = StageTimes(
            calibrate={k: ms * (2 + 0.1 * k) for k in (0, 1, 2, 4, 8)},
            verify={k: ms * (2 + 0.4 * k) for k in (0, 1, 2, 4, 8)},
            step={plan: ms * (0.5 + 0.09 * plan.sequential_steps) for plan in PLANS},
            other=6.0,
        )
        found.confirmed[size] = {
            point: confirmed(found, size, point)
            for point in (Point(PLANS[4], 3), Point(PLANS[6], 4), Point(untuned, 5), Point(untuned, 0))
        }
    found.baselines = {
        name: {size: factor * 80 * size**0.6 for size in SIZES}
        for name, factor in (("tuned", 1.3), ("untuned", 1.2), ("draft_model", 0.9), ("none", 0.7))
    }
    return found


def confirmed(found: Findings, size: int, point: Point) -> Confirmed:
    rate = predicted_rate(point, size, found.times[size], found.acceptance, found.correction, False) * (
        1.01 if size == 4 else 0.99
    )
    tokens = tokens_a_round(found.acceptance[point.plan], point.num_drafts)
    stages = found.times[size].round_ms(point, False)
    split = dict(calibrate=stages / 4, draft=stages / 2, verify=stages / 4)
    return Confirmed(tokens, split, stages + 6, stage_rate=rate, wall_rate=0.7 * rate)
