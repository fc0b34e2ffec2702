"""Whatever a user writes is either a configuration that survives every way it takes, or one line of error."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_easyspec.config import EasySpecConfig, load
from vllm_easyspec.documents import read_json, read_yaml
from vllm_easyspec.drafter.plan import DraftPlan, PlanTable, parse_grouping
from vllm_easyspec.errors import ConfigError

settings.register_profile("fuzz", max_examples=10 * int(os.environ.get("EASYSPEC_FUZZ_EXAMPLES", "15")), deadline=None)
settings.load_profile("fuzz")

LONGEST_ERROR = 4000
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=12)
SCOPES = st.sampled_from(["attention", "block"])
GROUPINGS = st.fixed_dictionaries({}, optional={"scope": SCOPES, "plan": SIZES.map(lambda s: "-".join(map(str, s)))})
SOUND = {
    "model": st.just("drafter"),
    "num_speculative_tokens": st.integers(1, 9),
    "layer_parallel": GROUPINGS,
    "draft_vocabulary": st.integers(1, 100_000),
    "quantization": st.just("int8_per_channel_weight_only"),
    "calibration": st.sampled_from(["every_round", "never"]),
    "check_ranks": st.booleans(),
    "draft_sample_method": st.sampled_from(["greedy", "probabilistic"]),
    "enable_adaptive_verification": st.booleans(),
}
NAMES = st.sampled_from([*EasySpecConfig.model_fields, "gamma", "draft_tensor_parallel_size"]) | st.text(max_size=10)


@st.composite
def configurations(draw) -> dict:
    """A sound configuration, or one with a few fields of anything."""
    fields = {"method": "easyspec"} | draw(st.fixed_dictionaries({}, optional=SOUND))
    return fields | draw(st.dictionaries(NAMES, VALUES, max_size=2))


def assert_one_line(error: ConfigError) -> None:
    assert 0 < len(str(error)) < LONGEST_ERROR
    assert "\n" not in str(error)


@given(configurations())
def test_a_configuration_is_read_whole_or_refused_in_one_line(fields):
    try:
        config = EasySpecConfig.parse(fields)
    except ConfigError as error:
        assert_one_line(error)
        return
    assert EasySpecConfig.parse(config.to_dict()) == config
    assert EasySpecConfig.parse(json.loads(json.dumps(config.to_dict()))) == config


@given(st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=4))
def test_yaml_reads_what_yaml_writes(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    try:
        found = read_yaml(text, "file")
    except ConfigError as error:
        assert_one_line(error)
        assert "*id" in text, "PyYAML writes equal lists as aliases, and only these are refused"
        return
    assert repr(found) == repr(yaml.safe_load(text))


@pytest.mark.parametrize("read", [read_yaml, read_json])
@given(text=st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("{}[]:-,'\"&*!|>\n #"), max_size=60))
def test_any_text_is_read_or_refused_in_one_line(read, text):
    try:
        read(text, "file")
    except ConfigError as error:
        assert_one_line(error)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("config") / "easyspec.yaml"


@given(content=st.binary(max_size=60))
def test_any_file_is_read_or_refused_in_one_line(path, content):
    path.write_bytes(content)
    try:
        assert isinstance(load(path), dict)
    except ConfigError as error:
        assert_one_line(error)


@given(SIZES, SCOPES)
def test_a_plan_is_its_text_and_covers_every_layer_once(sizes, scope):
    plan = DraftPlan(tuple(sizes), scope)
    assert DraftPlan(parse_grouping(plan.grouping), plan.scope) == plan
    assert [layer for group in plan.groups for layer in group] == list(range(plan.num_layers))
    assert DraftPlan.of_sizes(sum(sizes), sizes, scope) == plan
    precise = DraftPlan.precise(plan.num_layers)
    assert plan.sequential_steps <= precise.sequential_steps
    assert (plan == precise) is plan.is_precise


@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), SCOPES)
def test_a_plan_by_rule_has_its_ends_one_by_one(layers, size, head, tail, scope):
    plan = DraftPlan.grouped(layers, size, head, tail, scope)
    assert plan.num_layers == layers
    assert max(plan.group_sizes) <= size
    single = (1,) * min(head, layers)
    assert plan.group_sizes[: len(single)] == single


@given(st.lists(st.tuples(st.integers(1, 64), SIZES), max_size=5, unique_by=lambda entry: entry[0]), SIZES)
def test_a_table_has_the_plan_of_the_first_range_that_reaches(entries, last):
    ranges = [(up_to, DraftPlan(tuple(sizes))) for up_to, sizes in sorted(entries)]
    table, beyond = PlanTable.of(DraftPlan(tuple(last)), ranges), DraftPlan(tuple(last))
    for batch_size in range(1, 70):
        fitting = [plan for up_to, plan in ranges if up_to >= batch_size]
        assert table.at(batch_size) == (fitting[0] if fitting else beyond)
