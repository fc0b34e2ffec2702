"""Drafts from a part of the vocabulary, or from another one: the output stays the target's, and the pages precise.

With sampled drafts: tests/e2e/test_sampling.py.
"""

import json

import pytest
import tiny_targets
from engines import (
    DRAFTER,
    TARGET,
    assert_precise,
    assert_precise_mid_flight,
    assert_same_output_by_many_drafts,
    assert_some_accepted,
    easyspec,
    engine,
    greedy,
    mixed_prompts,
    token_ids,
)

from vllm_easyspec.drafter.vocabulary import VocabularyFile
from vllm_easyspec.tune.vocabulary import CountSettings, count

pytestmark = pytest.mark.engine
MOST_USED = 64  # of the 512 tokens, counted in the target's own answers
SMALL = ["--dtype=float32", "--block-size=32", f"--kv-cache-memory-bytes={1 << 28}", "--enforce-eager"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The file that `vllm-easyspec fit` writes from the target's answers, and its report."""
    folder = tmp_path_factory.mktemp("vocabulary")
    text, output = folder / "text.jsonl", folder / "vocabulary.json"
    text.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in mixed_prompts()))
    settings = CountSettings(MOST_USED, tokens=16 * 60, answer_tokens=60)
    return output, count(str(DRAFTER), [text], output, settings, str(TARGET), SMALL)


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def llm(request, counted, target_alone):
    config = easyspec(draft_vocabulary=str(counted[0]), layer_parallel={"mlp": "tensor"})
    with engine(speculative_config=config, tensor_parallel_size=request.param) as llm:
        yield llm


def test_the_file_says_how_it_was_made(counted, target_alone):
    path, about = counted
    file = VocabularyFile.read(str(path))
    assert file.about == {name: about[name] for name in file.about}
    assert MOST_USED <= len(file.ids) == about["tokens"] < MOST_USED + 5, "and special tokens"
    assert 0.8 * 16 * 60 < about["counted_tokens"] <= 16 * 60
    answers = [index for answer in target_alone[60] for index in answer]
    assert sum(index in file.ids for index in answers) > 0.85 * len(answers)
    assert about["coverage"] > about["coverage_of_lowest_ids"] > 0


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_output_is_the_targets(llm, target_alone, counted, scope):
    outside = {index for answer in target_alone[60] for index in answer} - set(VocabularyFile.read(str(counted[0])).ids)
    assert outside, "the target must also write what can't be drafted"
    assert_same_output_by_many_drafts(llm, target_alone[60], scope)


def test_audit_is_clean_mid_flight(llm):
    assert_precise_mid_flight(llm)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_drafter_with_another_tokenizer(tmp_path, target_alone, ranks):
    """Sampled drafts of greedy requests: the logits of shared tokens are kept under the target's ids."""
    drafter = tiny_targets.of_another_tokenizer(tmp_path / "another-tokenizer")
    config = easyspec(
        drafter, num_speculative_tokens=4, use_heterogeneous_vocab=True, draft_sample_method="probabilistic"
    )
    with engine(speculative_config=config, tensor_parallel_size=ranks) as llm:
        assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]
        assert_some_accepted(llm)
        assert_precise(llm, mixed_prompts())
