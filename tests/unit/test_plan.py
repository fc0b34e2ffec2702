"""`LayerPlan` and `LayerPlacement`."""

import pytest

from vllm_easyspec.drafter.placement import LayerPlacement, MlpPlacement
from vllm_easyspec.drafter.plan import LayerPlan


@pytest.mark.parametrize(
    ("layers", "size", "head", "tail", "sizes"),
    [
        (10, 4, 1, 1, (1, 4, 4, 1)),
        (16, 4, 1, 1, (1, 4, 4, 4, 2, 1)),
        (16, 4, 0, 0, (4, 4, 4, 4)),
        (7, 3, 2, 1, (1, 1, 3, 1, 1)),
        (5, 8, 1, 1, (1, 3, 1)),
        (2, 4, 1, 1, (1, 1)),
        (1, 4, 1, 1, (1,)),
        (3, 4, 2, 2, (1, 1, 1)),
        (6, 1, 1, 1, (1,) * 6),
    ],
)
def test_grouped_plans(layers, size, head, tail, sizes):
    assert LayerPlan.grouped(layers, size, head, tail).group_sizes == sizes


def test_groups_are_consecutive_and_cover_all_layers():
    plan = LayerPlan((1, 4, 3, 1))
    assert plan.groups == (range(0, 1), range(1, 5), range(5, 8), range(8, 9))
    assert [layer for group in plan.groups for layer in group] == list(range(plan.num_layers))
    assert str(plan) == "1-4-3-1"


def test_sequential_steps_are_the_definition():
    """1 + N a group in attention scope, 2 in block scope; the precise pass has 2 a layer in either."""
    plan = LayerPlan((1, 4, 4, 1))
    assert plan.sequential_steps("attention") == 2 + 5 + 5 + 2
    assert plan.sequential_steps("block") == 8
    precise = LayerPlan.precise(10)
    assert precise.is_precise and not plan.is_precise
    assert precise.sequential_steps("attention") == precise.sequential_steps("block") == 20


def test_sizes_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"group_sizes=\[1, 4\] add up to 5, but the drafter has 10 layers"):
        LayerPlan.of_sizes(10, [1, 4])


@pytest.mark.parametrize("sizes", [(), (1, 0, 2), (-1,)])
def test_empty_and_non_positive_groups_are_refused(sizes):
    with pytest.raises(ValueError, match="at least one group, each of at least 1"):
        LayerPlan(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("layers", [1, 3, 10])
def test_placement_gives_each_layer_to_one_rank_and_groups_to_slices(layers, ranks):
    placement = LayerPlacement(layers, ranks)
    assert sorted(layer for rank in range(ranks) for layer in placement.layers_of(rank)) == list(range(layers))
    for start in range(layers):
        for stop in range(start, layers + 1):
            group = range(start, stop)
            for rank in range(ranks):
                mine = list(placement.layers_of(rank))[placement.local_slice(rank, group)]
                assert mine == [layer for layer in group if placement.owner(layer) == rank]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_mlp_shards_cover_the_width_once(ranks):
    shards = [MlpPlacement.TENSOR.shard(384, rank, ranks) for rank in range(ranks)]
    assert [column for shard in shards for column in shard] == list(range(384))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert MlpPlacement.REPLICATE.shard(384, 0, ranks) == range(384)
