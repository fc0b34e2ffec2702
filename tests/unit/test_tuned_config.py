"""The tuned YAML: what it says reads back, and a served engine would do just that."""

import json

import pytest
import yaml
from tiny_models import DRAFTER
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import Point, choose, ranges
from vllm_easyspec.tune.tuned_yaml import tuned_yaml

BLOCK, PAPER, ONE = (
    DraftPlan(sizes, scope) for sizes, scope in (((1, 8, 1), "block"), ((1, 4, 4, 1), "attention"), ((10,), "block"))
)
CHOICES = {
    "one point": {1: Point(BLOCK, 4), 8: Point(BLOCK, 4)},
    "one plan, two K": {1: Point(BLOCK, 4), 8: Point(BLOCK, 2)},
    "two plans, one K": {1: Point(BLOCK, 4), 2: Point(PAPER, 4), 8: Point(PAPER, 4)},
    "all differs": {1: Point(BLOCK, 5), 2: Point(PAPER, 4), 8: Point(ONE, 2), 16: Point(ONE, 0)},
    "a hole": {1: Point(BLOCK, 3), 2: Point(PAPER, 0), 8: Point(ONE, 3)},
    "nothing first": {1: Point(BLOCK, 0), 2: Point(PAPER, 3)},
    "plans come back": {1: Point(BLOCK, 3), 2: Point(PAPER, 3), 4: Point(BLOCK, 3)},
    "nothing pays": {1: Point(BLOCK, 0), 4: Point(BLOCK, 0)},
}


@pytest.fixture
def untuned(tmp_path):
    path = tmp_path / "untuned.yaml"
    path.write_text(
        "method: easyspec\nmodel: ../drafter\nnum-speculative-tokens: 7\ndraft_sample_method: probabilistic\n"
        "layer_parallel: {group_size: 2, mlp: tensor}\ncheck_ranks: true\n"
        "num_speculative_tokens_per_batch_size: [[1, 2, 1]]\n"
    )
    return path


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES.keys())
def test_the_tuned_configuration_does_what_was_chosen(tmp_path, untuned, chosen):
    out = tmp_path / "sub" / "tuned.yaml"
    out.parent.mkdir()
    out.write_text(tuned_yaml(untuned, out, ranges(chosen), ["Tuned by: a test"], {}))
    config = EasySpecConfig.parse(out)
    plans = config.layer_parallel.plan_table(10)
    table = config.to_vllm()[0].get("num_speculative_tokens_per_batch_size", [[1, 1, config.num_speculative_tokens]])
    drafts = build_dynamic_sd_schedule_lookup(table, 64, config.num_speculative_tokens)
    for size in range(1, 65):
        expected = chosen.get(size) or chosen[min((s for s in chosen if s > size), default=max(chosen))]
        assert drafts[size] == expected.num_drafts
        if expected.num_drafts:
            assert plans.at(size) == expected.plan
    mlp = config.layer_parallel.mlp
    assert (config.draft_sample_method, config.check_ranks, mlp) == ("probabilistic", True, "tensor")


@pytest.mark.parametrize(("model", "written"), [("../drafter", "../../drafter"), ("a/hub-name", "a/hub-name")])
def test_a_relative_drafter_counts_from_the_tuned_file(tmp_path, untuned, model, written):
    untuned.write_text(untuned.read_text().replace("../drafter", model) + "lookahead: ./maps.safetensors\n")
    out = tmp_path / "sub" / "tuned.yaml"
    given = {"model": written, "lookahead": "../maps.safetensors"}
    text = tuned_yaml(untuned, out, ranges(CHOICES["one point"]), [], {})
    assert {name: yaml.safe_load(text)[name] for name in given} == given


def test_json_is_taken_too(tmp_path):
    source = tmp_path / "untuned.json"
    source.write_text(json.dumps({"method": "easyspec", "model": str(DRAFTER), "num_speculative_tokens": 2}))
    chosen = choose({1: {Point(BLOCK, 3): 2.0}}, 0.0)
    text = tuned_yaml(source, tmp_path / "tuned.yaml", ranges(chosen), ["first", "second"], {Point(BLOCK, 3): "a note"})
    assert text.startswith("# first\n# second\nmethod: easyspec\n")
    assert (
        "scope: block # a note\n" in text and "plan: 1-8-1 # 10 layers in 6 sequential steps, precise has 20\n" in text
    )
    assert yaml.safe_load(text)["model"] == str(DRAFTER)
