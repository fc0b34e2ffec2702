"""`EasySpecConfig`: every way to write it, and one clear error for every way to get it wrong."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError
from tiny_models import DRAFTER, easyspec
from vllm.config import SpeculativeConfig
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_easyspec.config import (
    FIELDS_OF_OTHER_METHODS,
    REFUSED_FIELDS,
    EasySpecConfig,
    LayerParallelConfig,
    RuntimeOptions,
    _warn_of_group_sizes,
    load,
)
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.packing import QUANTIZATIONS

PLAN = {"scope": "block", "plan": "1-4-4-1"}


def test_defaults_are_the_papers():
    config = EasySpecConfig.parse(easyspec())
    plan = config.layer_parallel
    assert (plan.scope, plan.group_size, plan.precise_head, plan.precise_tail, plan.mlp) == (
        "attention", 4, 1, 1, "auto",
    )  # fmt: skip
    assert (config.calibration, config.check_ranks) == ("every_round", False)


@pytest.mark.parametrize("form", ["yaml", "yml", "json", "inline", "dict", "path"])
def test_every_form_reads_the_same(tmp_path, form):
    written = easyspec(layer_parallel=PLAN, calibration="never", draft_sample_method="probabilistic")
    path = tmp_path / f"easyspec.{form if form in ('yml', 'json') else 'yaml'}"
    path.write_text(json.dumps(written) if form == "json" else yaml.safe_dump(written))
    value = {"inline": json.dumps(written), "dict": written, "path": path}.get(form, str(path))
    assert EasySpecConfig.parse(value) == EasySpecConfig.parse(written)


def test_a_model_path_counts_from_the_file_it_is_written_in(tmp_path):
    path = tmp_path / "sub" / "easyspec.yaml"
    path.parent.mkdir()
    for model, read in [
        ("../drafter", str(tmp_path.resolve() / "drafter")),
        ("./drafter", str(tmp_path.resolve() / "sub" / "drafter")),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/models/drafter", "/models/drafter"),
    ]:
        path.write_text(yaml.safe_dump(easyspec(model)))
        assert load(path)["model"] == read
        assert load(easyspec(model))["model"] == model, "a dict has no folder"


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle3"])
def test_another_method_is_read_and_not_touched(tmp_path, method):
    written = {"method": method, "model": "../somewhere", "num-speculative-tokens": 3, "anything": [1, {"a": None}]}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(written))
    assert load(str(path)) == load(json.dumps(written)) == load(written) == written


def test_dashes_in_names_are_taken_as_vllm_takes_them():
    assert EasySpecConfig.parse({"method": "easyspec", "model": "a", "num-speculative-tokens": 2}) == (
        EasySpecConfig.parse({"method": "easyspec", "model": "a", "num_speculative_tokens": 2})
    )


def test_nothing_changes_after_reading():
    config = EasySpecConfig.parse(easyspec())
    with pytest.raises(ValidationError, match="frozen"):
        config.num_speculative_tokens = 7
    with pytest.raises(ValidationError, match="frozen"):
        config.layer_parallel.group_size = 7


def test_plans():
    assert str(LayerParallelConfig().draft_plan(10)) == "attention 1-4-4-1"
    assert (
        str(LayerParallelConfig(group_size=3, precise_head=2, precise_tail=0).draft_plan(10)) == "attention 1-1-3-3-2"
    )
    assert str(LayerParallelConfig(plan="2-3-5", scope="block").draft_plan(10)) == "block 2-3-5"
    assert LayerParallelConfig(group_size=1, scope="block").draft_plan(10) == DraftPlan.precise(10)


@pytest.mark.parametrize("written", ["10", 10, [10], "[10]"])
def test_yaml_may_take_a_plan_for_a_number(written):
    """`plan: 10` is one group of 10 layers."""
    value = yaml.safe_load(f"plan: {written}")
    config = EasySpecConfig.parse(easyspec(layer_parallel=value))
    assert config.layer_parallel.draft_plan(10) == DraftPlan((10,))
    assert config.layer_parallel.to_json()["plan"] == "10"


def test_the_earlier_form_of_a_plan_is_read_with_one_warning(monkeypatch):
    said = []
    monkeypatch.setattr("vllm_easyspec.config.logger.warning", said.append)
    monkeypatch.setattr("vllm_easyspec.config._warn_of_group_sizes", cache(_warn_of_group_sizes.__wrapped__))
    now = easyspec(layer_parallel={**PLAN, "by_batch_size": [{"up_to": 4, "plan": "10"}]})
    expected = EasySpecConfig.parse(now).to_vllm()
    assert said == []
    table = [{"up_to": 4, "group_sizes": [10]}]
    written = easyspec(layer_parallel={"scope": "block", "group_sizes": [1, 4, 4, 1], "by_batch_size": table})
    assert [EasySpecConfig.parse(written).to_vllm() for _ in range(2)] == [expected] * 2
    (warning,) = said
    assert "group_sizes is now called plan: write plan: 1-4-4-1" in warning


def test_a_table_of_plans():
    layer_parallel = EasySpecConfig.parse(
        easyspec(layer_parallel={"group_size": 3, "by_batch_size": [{"up_to": 2, **PLAN}, {"up_to": 4}]})
    ).layer_parallel
    found = [(entry.up_to, str(entry.plan)) for entry in layer_parallel.plan_table(10).ranges]
    assert found == [(2, "block 1-4-4-1"), (4, "attention 1-4-4-1"), (None, "attention 1-3-3-2-1")]
    with pytest.raises(ConfigError, match=r"^layer_parallel.by_batch_size\[0\].plan=1-4-4-1: .* add up to 10"):
        layer_parallel.plan_table(12)


def test_a_table_of_k():
    """An entry that only sets K keeps the plan outside the table; one without K takes the K outside it."""
    table = [{"up_to": 2, "plan": "10"}, {"up_to": 8, "num_speculative_tokens": 2}, {"num_speculative_tokens": 0}]
    config = EasySpecConfig.parse(easyspec(layer_parallel={**PLAN, "by_batch_size": table}))
    plans = config.layer_parallel.plan_table(10)
    found = {size: (str(plans.at(size)), config.num_drafts_at(size)) for size in (1, 2, 3, 8, 9, 999)}
    assert found == {
        1: ("attention 10", 4), 2: ("attention 10", 4), 3: ("block 1-4-4-1", 2), 8: ("block 1-4-4-1", 2),
        9: ("block 1-4-4-1", 0), 999: ("block 1-4-4-1", 0),
    }  # fmt: skip
    speculative, options = config.to_vllm()
    assert speculative["num_speculative_tokens_per_batch_size"] == [[1, 2, 4], [3, 8, 2], [9, 9, 0]]
    assert RuntimeOptions.from_json(options).layer_parallel.plan_table(10) == plans
    assert EasySpecConfig.parse(config.to_dict()) == config


def test_beyond_a_table_of_k_rounds_draft_the_k_of_all():
    table = [{"up_to": 2, "num_speculative_tokens": 1}]
    config = EasySpecConfig.parse(easyspec(layer_parallel={"by_batch_size": table}))
    assert config.drafts_by_batch_size() == [[1, 2, 1], [3, 3, 4]]
    assert [config.num_drafts_at(size) for size in (2, 3, 99)] == [1, 4, 4]


def test_vllm_reads_a_table_of_k_as_we_do():
    table = [{"up_to": 3, "num_speculative_tokens": 3}, {"up_to": 5, "plan": "10"}]
    config = EasySpecConfig.parse(easyspec(layer_parallel={"by_batch_size": table}))
    lookup = build_dynamic_sd_schedule_lookup(
        config.to_vllm()[0]["num_speculative_tokens_per_batch_size"],
        vllm_max_batch_size=16,
        vllm_num_speculative_tokens=config.num_speculative_tokens,
    )
    assert lookup[1:] == [config.num_drafts_at(size) for size in range(1, 17)]


def test_to_vllm_passes_vllms_fields_and_keeps_ours_apart():
    speculative, options = EasySpecConfig.parse(
        easyspec(
            "drafter",
            layer_parallel=PLAN,
            check_ranks=True,
            max_model_len=128,
            draft_load_config={"load_format": "dummy"},
            num_speculative_tokens_per_batch_size=[[1, 8, 4], [9, 64, 2]],
        )
    ).to_vllm()
    assert speculative == {
        "method": "draft_model",
        "model": "drafter",
        "num_speculative_tokens": 4,
        "max_model_len": 128,
        "draft_load_config": {"load_format": "dummy"},
        "num_speculative_tokens_per_batch_size": [[1, 8, 4], [9, 64, 2]],
        "draft_tensor_parallel_size": 1,
        "use_local_argmax_reduction": True,
    }
    assert options == {
        "layer_parallel": {**PLAN, "mlp": "auto"},
        "calibration": "every_round",
        "grouped_attention": "auto",
        "check_ranks": True,
    }


@pytest.mark.parametrize(
    ("method", "written", "used"),
    [(None, None, True), ("greedy", None, True), ("greedy", False, False), ("probabilistic", None, None)],
)
def test_greedy_drafts_are_found_without_gathering_logits(method, written, used):
    config = EasySpecConfig.parse(easyspec(draft_sample_method=method, use_local_argmax_reduction=written))
    assert config.to_vllm()[0].get("use_local_argmax_reduction") is used


def test_adaptive_verification_gathers_logits():
    config = EasySpecConfig.parse(easyspec(enable_adaptive_verification=True))
    assert config.to_vllm()[0].get("use_local_argmax_reduction") is None
    assert config.to_vllm()[0]["enable_adaptive_verification"] is True


@pytest.mark.parametrize(
    "written",
    [
        {},
        PLAN,
        {"group_size": 2, "precise_head": 0, "mlp": "tensor"},
        {"group_size": 3, "by_batch_size": [{"up_to": 2, **PLAN}, {"group_size": 8}]},
    ],
)
def test_options_survive_the_way_to_the_worker(written):
    config = EasySpecConfig.parse(easyspec(layer_parallel=written, calibration="never"))
    carried = json.loads(json.dumps(config.to_vllm()[1]))
    options = RuntimeOptions.from_vllm(SimpleNamespace(additional_config={"easyspec": carried, "other": 1}))
    assert options.layer_parallel.plan_table(10) == config.layer_parallel.plan_table(10)
    assert (options.layer_parallel.mlp, options.calibration) == (config.layer_parallel.mlp, "never")


@pytest.mark.parametrize("additional", [{}, {"other": 1}, None])
def test_an_engine_without_our_options_is_told_so(additional):
    with pytest.raises(ConfigError, match="holds no 'easyspec' options.*method: easyspec"):
        RuntimeOptions.from_vllm(SimpleNamespace(additional_config=additional))


def test_every_field_of_vllm_is_either_passed_through_or_refused_by_name():
    """Fails if a new vLLM has a field that is neither passed through nor refused."""
    ours = set(EasySpecConfig.model_fields)
    internal = {"target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config"}
    theirs = {field.name for field in fields(SpeculativeConfig)} - internal
    assert theirs <= ours | set(REFUSED_FIELDS) | set(FIELDS_OF_OTHER_METHODS)
    assert not ours & (set(REFUSED_FIELDS) | set(FIELDS_OF_OTHER_METHODS))


WRONG = {
    "K = 0": ({"num_speculative_tokens": 0}, r"^num_speculative_tokens=0 is not allowed: .*from 1 to 256, such as 5$"),
    "K is text": ({"num_speculative_tokens": "5"}, r"num_speculative_tokens='5'.*valid integer"),
    "K is a truth value": ({"num_speculative_tokens": True}, "num_speculative_tokens=True.*valid integer"),
    "unknown key": (
        {"num_speculative_token": 3},
        "unknown key 'num_speculative_token' with value 3. Did you mean 'num_speculative_tokens'",
    ),
    "unknown inner key": (
        {"layer_parallel": {"group_sise": 2}},
        "unknown key 'layer_parallel.group_sise' with value 2. Did you mean 'group_size'.*Allowed are scope",
    ),
    "adaptive verification without logits": (
        {"enable_adaptive_verification": True, "use_local_argmax_reduction": True},
        "use_local_argmax_reduction=True is given together with enable_adaptive_verification=True.*Remove one",
    ),
    "unknown scope": ({"layer_parallel": {"scope": "mlp"}}, "layer_parallel.scope='mlp'.*'attention'.*'block'"),
    "a group of none": ({"layer_parallel": {"group_sizes": [1, 0, 4]}}, r"group_sizes\[1\]=0.*at least 1"),
    "a plan of none": (
        {"layer_parallel": {"plan": "1-0-4"}},
        "layer_parallel.plan='1-0-4' is not allowed: .*as 1-4-4-1",
    ),
    "a plan of words": ({"layer_parallel": {"plan": "all"}}, "layer_parallel.plan='all'.*sizes joined by dashes"),
    "a plan is a truth value": ({"layer_parallel": {"plan": True}}, "layer_parallel.plan=True.*valid string"),
    "two forms of a plan": (
        {"layer_parallel": {"plan": "1-4", "group_sizes": [1, 4]}},
        r"^layer_parallel.plan=1-4 is given together with group_sizes.*Remove plan, or remove group_sizes$",
    ),
    "a plan beside a rule": (
        {"layer_parallel": {"plan": "1-4", "group_size": 4}},
        r"^layer_parallel.plan=1-4 is given together with group_size.*Remove plan, or remove group_size$",
    ),
    "a K above that of all": (
        {"layer_parallel": {"by_batch_size": [{"up_to": 2, "num_speculative_tokens": 5}]}},
        r"^layer_parallel.by_batch_size\[0\].num_speculative_tokens=5 is more than num_speculative_tokens=4.*Raise",
    ),
    "a negative K": (
        {"layer_parallel": {"by_batch_size": [{"num_speculative_tokens": -1}]}},
        r"by_batch_size\[0\].num_speculative_tokens=-1.*at least 0",
    ),
    "two tables of K": (
        {
            "layer_parallel": {"by_batch_size": [{"num_speculative_tokens": 2}]},
            "num_speculative_tokens_per_batch_size": [[1, 8, 4]],
        },
        r"^layer_parallel.by_batch_size\[0\].num_speculative_tokens=2 is given together with num_speculative_"
        r"tokens_per_batch_size=\[\[1, 8, 4\]\], but only one of the two may set K.*Remove num_speculative_tokens_"
        r"per_batch_size, or",
    ),
    "no groups": ({"layer_parallel": {"group_sizes": []}}, r"group_sizes=\[\].*at least 1 item"),
    "sizes are text": ({"layer_parallel": {"group_sizes": "1,4"}}, "group_sizes='1,4'.*valid list"),
    "both ways to group": (
        {"layer_parallel": {"group_sizes": [1, 4], "group_size": 4}},
        r"^layer_parallel.group_sizes=\[1, 4\] is given together with group_size.*Remove group_sizes, or "
        r"remove group_size$",
    ),
    "a head and sizes": (
        {"layer_parallel": {"group_sizes": [1, 4], "precise_head": 1}},
        "is given together with precise_head",
    ),
    "group_size 0": ({"layer_parallel": {"group_size": 0}}, "layer_parallel.group_size=0.*at least 1"),
    "negative head": ({"layer_parallel": {"precise_head": -1}}, "layer_parallel.precise_head=-1.*at least 0"),
    "plan is a number": ({"layer_parallel": 4}, "layer_parallel=4.*mapping"),
    "a table's entry is a number": (
        {"layer_parallel": {"by_batch_size": [4]}},
        r"by_batch_size\[0\]=4.*such as \[{up_to",
    ),
    "the table is a mapping": ({"layer_parallel": {"by_batch_size": {"up_to": 4}}}, "by_batch_size={.*valid list"),
    "a table's scope": (
        {"layer_parallel": {"by_batch_size": [{"up_to": 4}, {"scope": "mlp"}]}},
        r"^layer_parallel.by_batch_size\[1\].scope='mlp' is not allowed: .*'attention'.*'block'",
    ),
    "a table's group of none": (
        {"layer_parallel": {"by_batch_size": [{"group_sizes": [1, 0]}]}},
        r"^layer_parallel.by_batch_size\[0\].group_sizes\[1\]=0.*at least 1",
    ),
    "an unknown key of a table": (
        {"layer_parallel": {"by_batch_size": [{"upto": 4}]}},
        r"unknown key 'layer_parallel.by_batch_size\[0\].upto' with value 4. Did you mean 'up_to'.*Allowed are scope",
    ),
    "both ways to group in a table": (
        {"layer_parallel": {"by_batch_size": [{"group_sizes": [1, 4], "group_size": 4}]}},
        r"^layer_parallel.by_batch_size\[0\].group_sizes=\[1, 4\] is given together with group_size, "
        r".*Remove group_sizes, or",
    ),
    "up to 0": ({"layer_parallel": {"by_batch_size": [{"up_to": 0}]}}, r"by_batch_size\[0\].up_to=0.*at least 1"),
    "an open entry before another": (
        {"layer_parallel": {"by_batch_size": [{"scope": "block"}, {"up_to": 4}]}},
        r"^layer_parallel.by_batch_size\[0\] has no up_to, and only the last .*remove the entries after it$",
    ),
    "ranges that don't rise": (
        {"layer_parallel": {"by_batch_size": [{"up_to": 4}, {"up_to": 4}]}},
        r"^layer_parallel.by_batch_size\[1\].up_to=4 is not above the 4 of the entry before. Order",
    ),
    "mlp": ({"layer_parallel": {"mlp": "shard"}}, "layer_parallel.mlp='shard'.*'tensor'.*'replicate'"),
    "calibration": ({"calibration": "sometimes"}, "calibration='sometimes'.*'every_round'.*'never'"),
    "grouped_attention": ({"grouped_attention": "fast"}, "grouped_attention='fast'.*'backend' .*'xformers' or 'auto'"),
    "check_ranks": ({"check_ranks": "yes"}, "check_ranks='yes'.*true or false"),
    "sampling": ({"draft_sample_method": "nucleus"}, "draft_sample_method='nucleus'.*'greedy' or 'probabilistic'"),
    "a lossy verification": ({"rejection_sample_method": "fly"}, "rejection_sample_method='fly'.*'standard'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_values(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        EasySpecConfig.parse(easyspec(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["model", "num_speculative_tokens"])
def test_missing_fields(missing):
    config = easyspec()
    del config[missing]
    with pytest.raises(ConfigError, match=f"{missing} is missing. Add it: "):
        EasySpecConfig.parse(config)


def test_all_errors_come_at_once():
    with pytest.raises(ConfigError, match="calibration='x'.*; num_speculative_tokens=0"):
        EasySpecConfig.parse(easyspec(num_speculative_tokens=0, calibration="x"))


@pytest.mark.parametrize("name", [*REFUSED_FIELDS, *FIELDS_OF_OTHER_METHODS])
def test_refused_fields_give_reason_and_remedy(name):
    with pytest.raises(ConfigError, match=f"^{name}=1 is not allowed with easyspec: .*Remove it"):
        EasySpecConfig.parse(easyspec(**{name: 1}))


def test_quantization_is_one_of_vllms_online_methods():
    for name in QUANTIZATIONS:
        assert name in QUANTIZATION_METHODS
        config = EasySpecConfig.parse(easyspec(quantization=name))
        fields, options = config.to_vllm()
        assert RuntimeOptions.from_json(options).quantization == name and "quantization" not in fields
        assert EasySpecConfig.parse(config.to_dict()) == config
    assert "quantization" not in EasySpecConfig.parse(easyspec()).to_vllm()[1]
    message = "quantization='awq' is not allowed: .*'int8_per_channel_weight_only' or 'fp8_per_channel'.*leave it out"
    with pytest.raises(ConfigError, match=message):
        EasySpecConfig.parse(easyspec(quantization="awq"))


def test_group_sizes_must_add_up_to_the_drafters_layers():
    plan = EasySpecConfig.parse(easyspec(layer_parallel={"group_sizes": [1, 4, 4]})).layer_parallel
    with pytest.raises(
        ConfigError, match="^layer_parallel.group_sizes=1-4-4: .* add up to 9, but the drafter has 10 layers. Make"
    ):
        plan.draft_plan(10)


FILES = {
    "missing": (None, "can't be read: No such file or directory. Give the path of a YAML or JSON file"),
    "broken YAML": ("method: easyspec\n  model: x\n", "is not valid YAML: line 2, column 8: .*Correct it there"),
    "unclosed": ("method: [easyspec\n", "is not valid YAML: line 2, column 1"),
    "a control character": ("method: \x07", "is not valid YAML: .*special characters are not allowed"),
    "not UTF-8": (b"\xff\xfe", "can't be read: it is not UTF-8 text"),
    "a list": ("- easyspec\n", r"holds list \['easyspec'\] where a mapping"),
    "empty": ("", "holds NoneType None where a mapping"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES.keys())
def test_files_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "easyspec.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        EasySpecConfig.parse(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_name_is_looked_up_among_the_shipped_files_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("tiny-pair")["model"] == str(DRAFTER)
    Path("tiny-pair").mkdir()
    assert load("tiny-pair")["model"] == str(DRAFTER), "a folder can't be meant"
    Path("tiny-pair").rmdir()
    Path("tiny-pair").write_text("method: easyspec\nmodel: mine")
    assert load("tiny-pair")["model"] == "mine"
    with pytest.raises(ConfigError, match=r"'tiny-pear' can't be read: .* one of the names .*.*, tiny-pair, inline"):
        load("tiny-pear")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "tiny-pear.yaml")
    assert "one of the names" not in str(error.value), "a path was meant"


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load(tmp_path)


def test_broken_json(tmp_path):
    with pytest.raises(ConfigError, match="the inline configuration is not valid JSON: line 1, column 2"):
        load("{method: easyspec}")
    path = tmp_path / "easyspec.json"
    path.write_text('{"method": easyspec}')
    with pytest.raises(ConfigError, match="easyspec.json is not valid JSON: line 1, column 12"):
        load(path)


@pytest.mark.parametrize("method", ["EasySpec", "easy_spec", "easy-spec"])
def test_a_misspelt_method(method):
    with pytest.raises(ConfigError, match=f"method='{method}' is unknown. Write method: easyspec"):
        load_and_ask({"method": method})


def test_a_forgotten_method():
    with pytest.raises(ConfigError, match="method is missing, but layer_parallel is given"):
        load_and_ask({"model": "x", "layer_parallel": {}})


def load_and_ask(config):
    from vllm_easyspec.config import is_easyspec

    return is_easyspec(load(config))


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "/no/where", "no/where/else", "~/nowhere-at-all"])
def test_a_missing_drafter_folder(model):
    with pytest.raises(ConfigError, match=r"model='.*' does not exist. Give the drafter's folder"):
        EasySpecConfig.parse(easyspec(model)).check_model()


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder with a config.json"):
        EasySpecConfig.parse(easyspec(tmp_path)).check_model()


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "gpt2", "s3://bucket/some/model", str(DRAFTER)])
def test_hub_names_and_folders_pass(model):
    EasySpecConfig.parse(easyspec(model)).check_model()


def test_the_error_names_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(easyspec(calibration="x")))
    with pytest.raises(ConfigError, match="^.*my.yaml: calibration='x'"):
        EasySpecConfig.parse(path)


def test_parse_wants_easyspec():
    with pytest.raises(ConfigError, match="method='ngram' is not easyspec"):
        EasySpecConfig.parse({"method": "ngram"})
