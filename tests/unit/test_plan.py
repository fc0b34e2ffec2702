"""`DraftPlan`, `PlanTable` and `LayerPlacement`."""

import pytest

from vllm_easyspec.drafter.placement import LayerPlacement, MlpPlacement
from vllm_easyspec.drafter.plan import DraftPlan, PlanRange, PlanTable, parse_grouping


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
    assert DraftPlan.grouped(layers, size, head, tail).group_sizes == sizes


def test_groups_are_consecutive_and_cover_all_layers():
    plan = DraftPlan((1, 4, 3, 1))
    assert plan.groups == (range(0, 1), range(1, 5), range(5, 8), range(8, 9))
    assert [layer for group in plan.groups for layer in group] == list(range(plan.num_layers))
    assert (plan.grouping, str(plan)) == ("1-4-3-1", "attention 1-4-3-1")
    assert parse_grouping(plan.grouping) == plan.group_sizes


@pytest.mark.parametrize("text", ["", "1-", "-1", "1--4", "1-0", "1,4", "1-x", "1-\u00b2", " 1-4"])
def test_other_texts_are_no_plan(text):
    with pytest.raises(ValueError, match="is not a plan. Give the sizes of all groups in order, such as 1-4-4-1"):
        parse_grouping(text)


def test_there_is_one_precise_plan():
    assert DraftPlan((1,) * 4, "block") == DraftPlan.precise(4)
    assert str(DraftPlan((1,) * 4, "block")) == "precise"
    assert DraftPlan((4,), "block") != DraftPlan((4,), "attention")


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope='mlp' is not one of attention, block"):
        DraftPlan((1, 4), "mlp")


def test_sequential_steps_are_the_definition():
    """1 + N per group in attention scope, 2 in block scope; the precise pass has 2 per layer in either."""
    plan = DraftPlan((1, 4, 4, 1), "attention")
    assert plan.sequential_steps == 2 + 5 + 5 + 2
    assert DraftPlan((1, 4, 4, 1), "block").sequential_steps == 8
    precise = DraftPlan.precise(10)
    assert precise.is_precise and not plan.is_precise
    assert precise.sequential_steps == 20


def test_sizes_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"^plan=1-4: the group sizes add up to 5, but the drafter has 10 layers"):
        DraftPlan.of_sizes(10, [1, 4])


@pytest.mark.parametrize("sizes", [(), (1, 0, 2), (-1,)])
def test_empty_and_non_positive_groups_are_refused(sizes):
    with pytest.raises(ValueError, match="at least one group, each of at least 1 layer"):
        DraftPlan(sizes)


PRECISE, HALVES, ONE = DraftPlan.precise(4), DraftPlan((2, 2), "block"), DraftPlan((4,), "block")


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ((), [PRECISE] * 6),
        (((2, HALVES), (4, ONE)), [HALVES, HALVES, ONE, ONE, PRECISE, PRECISE]),
        (((1, HALVES), (None, ONE)), [HALVES] + [ONE] * 5),
    ],
    ids=["none", "default above", "open"],
)
def test_a_table_has_a_plan_for_every_batch_size(ranges, expected):
    table = PlanTable.of(PRECISE, ranges)
    assert [table.at(size) for size in range(1, 7)] == expected
    assert table.plans == tuple(dict.fromkeys(expected)) and table.largest == expected[-1]


@pytest.mark.parametrize("ends", [[4, 2, None], [2, 2, None], [2], [None, 2], [None, None]])
def test_ranges_that_do_not_ascend_to_an_open_one_are_refused(ends):
    with pytest.raises(ValueError, match="don't ascend to one without an end"):
        PlanTable(tuple(PlanRange(end, ONE) for end in ends))


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
