"""A fuzzy step with look-ahead maps, in real tensor-parallel processes, against a plain implementation, float32."""

from functools import cache

import numpy as np
import pytest
import torch
from drafter_cases import CASES, PROMPTS, SCOPES, STEPS, make_checkpoint
from lookahead_cases import MAP_RANK, random_maps, run_case
from reference import DenseRequest

from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
TOLERANCE = 2e-4
CASE = next(case for case in CASES if case.name == "llama3_rope")
LAYERS, HIDDEN = CASE.config.num_hidden_layers, CASE.config.hidden_size
# Longer than some groups, so that a group takes a part of its maps.
REACH = {0: LAYERS - 1, 1: LAYERS - 1, 2: LAYERS - 1}
KEYS = [(plan, scope) for plan in CASE.plans for scope in SCOPES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lookahead") / CASE.name
    return folder, make_checkpoint(CASE, folder)


@pytest.fixture(scope="module")
def results_at(checkpoint):
    """From a rank count to each rank's result."""

    @cache
    def run(num_ranks: int):
        return run_ranks(num_ranks, run_case, str(checkpoint[0]), CASE, REACH)

    return run


@pytest.fixture(scope="module")
def expected(checkpoint):
    tensors = random_maps(HIDDEN, REACH)
    maps = {}
    for kind in ("attention", "mlp"):
        for start, last in REACH.items():
            down, up, bias = (tensors[f"{kind}.{start}.{part}"] for part in ("down", "up", "bias"))
            for index in range(last - start):
                maps[kind, start, start + 1 + index] = (down[index] @ up[index], bias[index])
    found = {}
    for plan, scope in KEYS:
        requests = [DenseRequest(checkpoint[1], None) for _ in PROMPTS]
        for request, prompt in zip(requests, PROMPTS, strict=True):
            request.read(prompt, [1] * LAYERS, "attention")
        found[plan, scope] = [
            torch.cat([r.read(ids, plan, scope, maps) for r, ids in zip(requests, step, strict=True)]).numpy()
            for step in STEPS
        ]
    return found


def assert_close(actual: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("plan", "scope"), KEYS)
def test_a_step_with_maps_is_its_definition(ranks, plan, scope, results_at, expected):
    first, *others = (result.with_maps[plan, scope] for result in results_at(ranks))
    assert_close(first.logits, expected[plan, scope])
    for other in others:
        assert [a.tobytes() for a in other.logits] == [a.tobytes() for a in first.logits]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("plan", "scope"), KEYS)
def test_maps_matter_and_cost_no_call_or_collective(ranks, plan, scope, results_at):
    for result in results_at(ranks):
        with_maps, without = result.with_maps[plan, scope], result.without[plan, scope]
        assert np.abs(with_maps.logits[0] - without.logits[0]).max() > 100 * TOLERANCE
        assert with_maps.counters == without.counters


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_precise_plan_does_not_touch_them(ranks, results_at, checkpoint):
    requests = [DenseRequest(checkpoint[1], None) for _ in PROMPTS]
    for request, prompt in zip(requests, PROMPTS, strict=True):
        request.read(prompt, [1] * LAYERS, "attention")
    wanted = [
        torch.cat([r.read(ids, [1] * LAYERS, "block") for r, ids in zip(requests, step, strict=True)]).numpy()
        for step in STEPS
    ]
    assert_close(results_at(ranks)[0].precise.logits, wanted)


def test_a_rank_holds_the_attention_maps_of_its_own_layers(results_at):
    attention = MAP_RANK * 5 * HIDDEN + HIDDEN
    mlp = MAP_RANK * 6 * HIDDEN + HIDDEN
    for rank, result in enumerate(results_at(4)):
        own = sum(layer % 4 == rank for start, last in REACH.items() for layer in range(start + 1, last + 1))
        every = sum(last - start for start, last in REACH.items())
        assert result.map_parameters == own * attention + every * mlp
