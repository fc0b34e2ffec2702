"""Prompts as token ids: every arm of a benchmark reads the same ones, without tokenizing."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_easyspec.bench import BenchmarkError

FORMS = 'Allowed are {"prompt": text or token ids}, {"text": ...} and {"turns": [...]}, of which the first is asked'
TEXT_FORMS = 'Allowed are "...", {"text": "..."} and {"prompt": "..."}'


def read_prompts(path: Path, model: str, limit: int | None = None) -> list[list[int]]:
    """The prompts of a JSONL file, by `model`'s tokenizer; of each at most the first `limit` tokens.

    Raises `BenchmarkError` for a file or a line that can't be used.
    """
    entries = list(json_lines(path, "--prompts", FORMS))
    if not entries:
        raise BenchmarkError(f"--prompts {path} holds no prompt. Write one per line: {FORMS}")
    tokenizer = _Tokenizer(model)
    return [_ids(entry, place, tokenizer)[:limit] for place, entry in entries]


def read_text(path: Path, option: str) -> str:
    """A file that `option` names. Raises `BenchmarkError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{option} {path} can't be read ({error}). Give a file of UTF-8 text") from error


def json_lines(path: Path, option: str, forms: str) -> Iterator[tuple[str, Any]]:
    """The place and the value of every line that is not empty. forms: the allowed forms, for errors."""
    for number, line in enumerate(read_text(path, option).splitlines(), 1):
        if line.strip():
            place = f"{option} {path}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise BenchmarkError(f"{place} is not JSON ({error.msg}). {forms}") from error


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Each plain file is a text; of a JSONL file each line, `"..."`, `{"text": ...}` or `{"prompt": ...}`, is one."""
    texts = []
    for path in paths:
        if path.suffix == ".jsonl":
            texts += [_text_of(entry, place) for place, entry in json_lines(path, "--text", TEXT_FORMS)]
        else:
            texts.append(read_text(path, "--text"))
    return texts


def _text_of(entry: Any, place: str) -> str:
    text = entry.get("text", entry.get("prompt")) if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise BenchmarkError(f"{place} is {json.dumps(entry):.60}. {TEXT_FORMS}")
    return text


def random_prompts(count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids each, the same in every run."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(tokens)] for _ in range(count)]


def _ids(entry: Any, place: str, tokenizer: "_Tokenizer") -> list[int]:
    match entry:
        case {"prompt": [*ids]} if ids and all(type(token) is int for token in ids):
            return ids
        case {"prompt": str(text)} | {"text": str(text)} if text:
            return tokenizer.text(text)
        case {"turns": [str(text), *_]} if text:
            return tokenizer.turn(text)
    raise BenchmarkError(f"{place} is {json.dumps(entry):.60}. {FORMS}")


class _Tokenizer:
    """The target's tokenizer, loaded for the first text."""

    def __init__(self, model: str):
        self.model = model
        self.loaded: Any = None

    def text(self, text: str) -> list[int]:
        return self._get()(text)["input_ids"]

    def turn(self, text: str) -> list[int]:
        """A user's message, in the chat template if there is one."""
        tokenizer = self._get()
        if tokenizer.chat_template is None:
            return self.text(text)
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

            try:
                self.loaded = AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise BenchmarkError(
                    f"--model {self.model} has no tokenizer for --prompts ({reason:.200}). Give prompts as token ids, "
                    "or leave --prompts out for random ones"
                ) from error
        return self.loaded
