"""The configurations in `configs/`: each is read, and checked against its pair's published `config.json` files."""

import re

import pytest
from tiny_models import CONFIGS, DRAFTER, HF_CONFIGS, ROOT, TARGET

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.doctor import diagnose

FILES = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED = [path for path in FILES if not path.stem.startswith("tiny-pair")]


def pair(path):
    """Folders of the target, which the comment's `vllm serve` names, and of the drafter."""
    target = re.search(r"^#   vllm serve (\S+)", path.read_text(), re.MULTILINE)[1]
    drafter = EasySpecConfig.parse(path).model
    if path not in PUBLISHED:
        return ROOT / target, drafter
    return HF_CONFIGS / target.split("/")[1], HF_CONFIGS / drafter.split("/")[1]


def test_all_pairs_are_there():
    assert len(PUBLISHED) == 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_comment_serves_this_file(path):
    text = path.read_text()
    assert f"--speculative-config configs/{path.name}\n" in text
    assert re.search(r"--tensor-parallel-size \d", text)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_doctor_passes(path, ranks):
    target, drafter = pair(path)
    config = EasySpecConfig.parse(path).model_copy(update={"model": str(drafter)})
    report = diagnose(config, ranks, str(target), device="cuda")
    assert sum(line.startswith("rank ") for line in report) == ranks
    (vocabulary,) = (line for line in report if line.startswith("vocabulary"))
    padded = "less padding" in path.read_text()
    assert ("the rest is padding" if padded else "tokens in both") in vocabulary


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_plan_in_the_comment_is_the_plan(path):
    text = path.read_text()
    by_rule, by_plan = (
        re.search(r"(\d+) layers as ([\d-]+)", text),
        re.search(r"plan: ([\d-]+) # (\d+) layers in", text),
    )
    layers, grouping = by_rule.groups() if by_rule else by_plan.groups()[::-1]
    _, drafter = pair(path)
    config = EasySpecConfig.parse(path).model_copy(update={"model": str(drafter)})
    (plan,) = (line for line in diagnose(config, 1) if line.startswith("plan"))
    assert plan.split()[1].rstrip(",") == grouping
    assert config.layer_parallel.draft_plan(int(layers)).grouping == grouping


@pytest.mark.parametrize("name", ["tiny-pair.yaml", "tiny-pair-lookahead.yaml", "tiny-pair-tuned.yaml"])
def test_the_tiny_pair_is_the_repository_s_own(name):
    target, drafter = pair(CONFIGS / name)
    assert (target, drafter) == (TARGET, str(DRAFTER))
