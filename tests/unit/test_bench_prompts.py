"""Prompts of `bench engine`: JSONL files, their errors, random ids."""

import pytest
from tiny_models import TARGET, model_folder
from transformers import AutoTokenizer

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.bench.prompts import random_prompts, read_prompts


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_every_form_of_a_line(jsonl):
    path = jsonl(
        '{"prompt": "import os"}', "", '{"text": "import os"}', '{"prompt": [5, 6, 7]}', '{"turns": ["hi", "more"]}'
    )
    prompt, text, ids, turn = read_prompts(path, str(TARGET))
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    assert tokenizer.decode(prompt) == "import os"
    assert (text, ids) == (prompt, [5, 6, 7])
    asked = tokenizer.decode(turn)
    assert "# user" in asked and "hi" in asked and "more" not in asked, "the first turn, as the chat template has it"


def test_limit_keeps_the_first_tokens(jsonl):
    path = jsonl('{"prompt": [5, 6, 7]}', '{"prompt": [8]}')
    assert read_prompts(path, str(TARGET), 2) == [[5, 6], [8]]


def test_turns_without_a_chat_template(jsonl, tmp_path):
    plain = model_folder(tmp_path / "plain", like=TARGET)
    path = jsonl('{"turns": ["import os"]}', '{"prompt": "import os"}')
    turn, prompt = read_prompts(path, str(plain))
    assert turn == prompt


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{prompt}", "is not JSON"),
        ('{"question": "what"}', r"is \{\"question\": \"what\"\}. Allowed are"),
        ('{"prompt": ""}', "Allowed are"),
        ('{"prompt": []}', "Allowed are"),
        ('{"prompt": [1, "2"]}', "Allowed are"),
        ('{"turns": []}', "Allowed are"),
        ('["a"]', "Allowed are"),
    ],
)
def test_bad_line_is_named(jsonl, line, reason):
    with pytest.raises(BenchmarkError, match=rf"prompts\.jsonl, line 2 {'' if 'JSON' in reason else '.*'}{reason}"):
        read_prompts(jsonl('{"prompt": [1]}', line), str(TARGET))


def test_empty_file(jsonl):
    with pytest.raises(BenchmarkError, match="holds no prompt"):
        read_prompts(jsonl(""), str(TARGET))


def test_missing_file(tmp_path):
    with pytest.raises(BenchmarkError, match="can't be read .*No such file.*Give a file of UTF-8 text"):
        read_prompts(tmp_path / "none.jsonl", str(TARGET))


def test_text_without_a_tokenizer(jsonl, tmp_path):
    bare = str(model_folder(tmp_path / "bare", like=TARGET, tokenizer=False))
    assert read_prompts(jsonl('{"prompt": [1]}'), bare) == [[1]]
    with pytest.raises(BenchmarkError, match="has no tokenizer for --prompts .*Give prompts as token ids"):
        read_prompts(jsonl('{"prompt": "a"}'), bare)


def test_random_prompts_are_the_same_in_every_run():
    prompts = random_prompts(3, 40, 7)
    assert prompts == random_prompts(3, 40, 7) and prompts[0] != prompts[1]
    assert [len(prompt) for prompt in prompts] == [40] * 3
    assert {token for prompt in prompts for token in prompt} == set(range(7))
