"""The score of a group: its pass equals the drafter's first fuzzy step, at every position at once."""

from pathlib import Path

import pytest
import torch

from vllm_easyspec.drafter.paged_kv import DensePass
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.fidelity import FirstStepPass, group_costs
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
DRAFTER = Path(__file__).parents[2] / "examples" / "tiny-pair" / "drafter"
LAYERS = 10
TOKENS = torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(1))
POSITIONS = (1, 7, 23)
PLANS = ((1, 4, 4, 1), (1, 1, 3, 1, 1, 1, 1, 1), (10,), (1,) * LAYERS)


def first_steps() -> tuple[list[float], dict[str, list[tuple[int, int, float]]]]:
    """Differences between the scored pass and real steps over pages, and the groups' scores, on this rank."""
    drafter = EnginelessDrafter(DRAFTER, max_num_reqs=1, max_len=64)
    differences = []
    with torch.inference_mode():
        precise = DensePass(len(TOKENS), None, drafter.device)
        drafter.model(TOKENS, drafter.precise, precise)
        for scope in SCOPES:
            for sizes in PLANS:
                plan = DraftPlan(sizes, scope)
                scored = drafter.model(TOKENS, plan, FirstStepPass(precise))
                for position in POSITIONS:
                    drafter.rewind([0])
                    drafter.read([TOKENS[:position].tolist()])
                    real = drafter.read([[int(TOKENS[position])]], plan)
                    differences.append(float((scored[position] - real[0]).abs().max()))
    return differences, {scope: group_costs(drafter.model, TOKENS, scope, 4) for scope in SCOPES}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def by_rank(request):
    return run_ranks(request.param, first_steps)


def test_the_scored_pass_is_a_real_first_step(by_rank):
    for differences, _ in by_rank:
        assert len(differences) == len(SCOPES) * len(PLANS) * len(POSITIONS)
        assert max(differences) < 1e-4


def test_scores(by_rank):
    for _, by_scope in by_rank:
        assert by_scope == by_rank[0][1], "every rank must plan alike"
        for scores in by_scope.values():
            costs = {(start, size): cost for start, size, cost in scores}
            assert set(costs) == {(start, size) for size in (2, 3, 4) for start in range(LAYERS - size + 1)}
            assert min(costs.values()) > 0 and max(costs.values()) < 1
            first = costs.pop((0, 2))
            assert first > max(cost for (_, size), cost in costs.items() if size == 2), (
                "the default plan keeps it alone"
            )
