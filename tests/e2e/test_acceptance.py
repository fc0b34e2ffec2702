"""Acceptance when the drafter is the target itself: 100%, unless layers run side by side."""

import pytest
from engines import TARGET, configure, easyspec, engine, greedy, mixed_prompts, stats, token_ids

pytestmark = pytest.mark.engine
LAYERS = 6  # of the tiny pair's target


@pytest.fixture(scope="module")
def llm():
    config = easyspec(TARGET, num_speculative_tokens=5, layer_parallel={"group_sizes": [1] * LAYERS})
    with engine(speculative_config=config) as llm:
        yield llm


def acceptance(llm, **drafting) -> list[float]:
    configure(llm, **drafting)
    token_ids(llm, mixed_prompts(), greedy(61))
    return stats(llm)[0]["acceptance"]


def test_drafter_equal_to_target(llm):
    precise = acceptance(llm, group_sizes=[1] * LAYERS)
    assert precise == [1.0] * 5
    for scope in ("attention", "block"):
        fuzzy = acceptance(llm, group_sizes=[1, 4, 1], scope=scope, calibration="every_round")
        uncalibrated = acceptance(llm, group_sizes=[1, 4, 1], scope=scope, calibration="never")
        assert sum(uncalibrated) < sum(fuzzy) < 5.0
