"""What may be changed in a running engine, and how rounds are counted."""

from dataclasses import replace

import pytest
import torch

from vllm_easyspec.drafter.plan import DraftPlan, PlanTable
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.lookahead import LookaheadFile
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.settings import DraftSettings, LiveSettings

HALVES, ONE = DraftPlan((2, 2), "block"), DraftPlan((4,), "block")
CONFIGURED = DraftSettings(PlanTable.of(HALVES, [(2, ONE)]), num_drafts=5)
MAPS = LookaheadFile("maps.safetensors", "", {0: 1, 2: 3}, 8, 16, {})


def test_a_plan_holds_for_all_batch_sizes_until_it_is_restored():
    settings = LiveSettings(CONFIGURED, None)
    settings.change(plan="1-3", num_drafts=2)
    assert settings.current == DraftSettings(PlanTable.of(DraftPlan((1, 3), "block")), 2)
    settings.change(scope="attention")
    assert settings.current.plans == PlanTable.of(DraftPlan((1, 3)))
    settings.change(plan=[4], calibration="never")
    assert settings.current == DraftSettings(PlanTable.of(DraftPlan((4,))), 2, "never")
    settings.change(restore=True, num_drafts=3)
    assert settings.current == replace(CONFIGURED, num_drafts=3)


WRONG = {
    "scope": ({"scope": "mlp"}, "^scope='mlp' is not one of attention, block$"),
    "layers": ({"plan": "1-4"}, "^plan=1-4: the group sizes add up to 5, but the drafter has 4 layers"),
    "text": ({"plan": "1-x"}, "^plan='1-x' is not a plan"),
    "a group of none": ({"plan": [4, 0]}, "at least one group, each of at least 1 layer"),
    "K": ({"num_drafts": 6}, "^num_speculative_tokens=6 is not one of 1, 2, 3, 4, 5$"),
    "no K": ({"num_drafts": 0}, "^num_speculative_tokens=0 is not one of 1"),
    "calibration": ({"calibration": "twice"}, "^calibration='twice' is not one of every_round, never$"),
    "maps": ({"lookahead": True}, "^lookahead=True is not one of False$"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_the_drafter_can_not_do_changes_nothing(change, message):
    settings = LiveSettings(CONFIGURED, None)
    with pytest.raises(ValueError, match=message):
        settings.change(**{"calibration": "never"} | change)
    assert settings.current == CONFIGURED


def test_plans_without_maps_are_refused_while_maps_are_used():
    settings = LiveSettings(replace(CONFIGURED, plans=PlanTable.of(HALVES), lookahead=True), MAPS)
    with pytest.raises(ConfigError, match="has no maps for layers"):
        settings.change(plan="4")
    settings.change(plan="4", lookahead=False)
    with pytest.raises(ConfigError, match="has no maps for layers"):
        LiveSettings(replace(CONFIGURED, lookahead=True), MAPS)


def test_rounds_are_counted_by_plan():
    statistics = DraftStatistics(torch.device("cpu"), 5)
    for drafts, plan in [(5, HALVES), (5, HALVES), (0, HALVES), (5, ONE)]:
        statistics.rounds_by_plan[drafts, plan] += 1
    rows = statistics.snapshot()["rounds_by_plan"]
    assert [(row["num_speculative_tokens"], row["group_sizes"], row["rounds"]) for row in rows] == [
        (5, [2, 2], 2), (0, [2, 2], 1), (5, [4], 1),
    ]  # fmt: skip
