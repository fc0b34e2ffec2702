"""Prompts as token ids: every arm of a benchmark reads the same ones, and no arm spends time on text."""

import json
import random
from pathlib import Path
from typing import Any

from vllm_easyspec.bench import BenchmarkError

FORMS = 'Allowed are {"prompt": text or token ids}, {"text": ...} and {"turns": [...]}, of which the first is asked'


def read_prompts(path: Path, model: str, limit: int | None = None) -> list[list[int]]:
    """The prompts of a JSONL file, by `model`'s tokenizer; of each at most the first `limit` tokens.

    Raises `BenchmarkError` for a file or a line that can't be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--prompts {path} can't be read ({error}). Give a JSONL file") from error
    entries = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise BenchmarkError(f"--prompts {path} holds no prompt. Write one a line: {FORMS}")
    tokenizer = _Tokenizer(model)
    return [_ids(line, f"--prompts {path}, line {number}", tokenizer)[:limit] for number, line in entries]


def random_prompts(count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids each, the same in every run."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(tokens)] for _ in range(count)]


def _ids(line: str, place: str, tokenizer: "_Tokenizer") -> list[int]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{place} is not JSON ({error.msg}). {FORMS}") from error
    match entry:
        case {"prompt": [*ids]} if ids and all(type(token) is int for token in ids):
            return ids
        case {"prompt": str(text)} | {"text": str(text)} if text:
            return tokenizer.text(text)
        case {"turns": [str(text), *_]} if text:
            return tokenizer.turn(text)
    raise BenchmarkError(f"{place} is {line:.60}. {FORMS}")


class _Tokenizer:
    """The target's, loaded when the first text needs it."""

    def __init__(self, model: str):
        self.model = model
        self.loaded: Any = None

    def text(self, text: str) -> list[int]:
        return self._get()(text)["input_ids"]

    def turn(self, text: str) -> list[int]:
        """A user's message, as the chat template has it where there is one."""
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
