"""Pairs whose ids mean different tokens, found by their tokenizers before a model is loaded."""

import json

import pytest
from tiny_models import DRAFTER, TARGET, easyspec, model_folder, with_other_tokens
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vllm_easyspec import support
from vllm_easyspec.cli import main
from vllm_easyspec.errors import ConfigError

TURNED = {index: (index + 100) % 512 for index in range(512)}  # every id
FEW = {300: 301, 301: 300, 5: 6, 6: 5}


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_general_plugins()


@pytest.fixture
def told(monkeypatch):
    """What easyspec logs of a pair. vLLM sets its loggers up anew in its own time, so not through handlers."""
    lines = []
    monkeypatch.setattr(support.logger, "info", lambda form, *values: lines.append(form % values))
    return lambda: " ".join(lines)


def engine_config(drafter, target=TARGET, **arguments):
    given = {"max_model_len": 256, "speculative_config": easyspec(drafter)} | arguments
    args = EngineArgs(model=str(target), **given)
    return args.create_engine_config()


def test_one_size_and_other_tokens(tmp_path, capsys):
    drafter = with_other_tokens(model_folder(tmp_path / "drafter"), TURNED)
    message = "512 of the 512 ids that both tokenizers have stand for different tokens, such as id 0: "
    with pytest.raises(ConfigError, match=message) as error:
        engine_config(drafter)
    assert "with the target's tokenizer, or write use_heterogeneous_vocab: true" in str(
        error.value
    ) and "\n" not in str(error.value)
    assert main(["doctor", json.dumps(easyspec(drafter)), "--model", str(TARGET)]) == 1
    assert message in capsys.readouterr().err


def test_a_few_renamed_tokens_are_told_of(tmp_path, told, capsys):
    drafter = with_other_tokens(model_folder(tmp_path / "drafter"), FEW)
    engine_config(drafter)
    assert "4 of the 512 ids that both tokenizers have stand for different tokens, such as id 5: " in told()
    assert main(["doctor", json.dumps(easyspec(drafter)), "--model", str(TARGET)]) == 0
    assert "512 tokens in both; 4 of the 512 ids" in capsys.readouterr().out


def test_equal_tokens_are_not_worth_a_line(told, capsys):
    engine_config(DRAFTER)
    assert told() == ""
    assert main(["doctor", json.dumps(easyspec()), "--model", str(TARGET)]) == 0
    assert "512 tokens in both; the tokenizers agree" in capsys.readouterr().out


def test_without_a_tokenizer_tokens_are_not_compared(tmp_path, told):
    turned = with_other_tokens(model_folder(tmp_path / "drafter"), TURNED)
    engine_config(turned, skip_tokenizer_init=True)
    assert "the target has no tokenizer here, so the drafter's tokens are not compared" in told()
    engine_config(model_folder(tmp_path / "bare", tokenizer=False))
    assert "the drafter has no tokenizer here" in told()


def test_tokens_that_both_have(tmp_path, told, capsys):
    drafter = with_other_tokens(model_folder(tmp_path / "drafter"), TURNED)
    translated = easyspec(drafter, use_heterogeneous_vocab=True)
    engine_config(drafter, speculative_config=translated)
    line = "another tokenizer: drafts come from the 512 tokens that it shares with the target's 512"
    assert line in told()
    assert main(["doctor", json.dumps(translated), "--model", str(TARGET)]) == 0
    assert line in capsys.readouterr().out


def test_translation_needs_both_tokenizers(tmp_path):
    bare = model_folder(tmp_path / "bare", tokenizer=False)
    for drafter, more, whose in ((bare, {}, "drafter"), (DRAFTER, {"skip_tokenizer_init": True}, "target")):
        with pytest.raises(
            ConfigError, match=f"use_heterogeneous_vocab=True .* the {whose} has none here. Give a {whose}"
        ):
            engine_config(drafter, speculative_config=easyspec(drafter, use_heterogeneous_vocab=True), **more)
