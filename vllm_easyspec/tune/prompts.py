"""Prompts from a file: JSON lines, or plain lines."""

import json
from pathlib import Path
from typing import Any

from vllm_easyspec.config import ConfigError

KEYS = "prompt", "text", "turns"


def read_prompts(path: Path, tokenizer: Any, most_tokens: int) -> list[dict[str, list[int]]]:
    """The file's prompts as vLLM's token prompts, each cut to its first `most_tokens`. Raises `ConfigError`.

    A `.jsonl` file holds one object a line: {"prompt": ...}, {"text": ...}, or {"turns": [...]}, whose first turn is
    put into the tokenizer's chat template where it has one. Of any other file each line is a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={str(path)!r} can't be read: {error}. Give a file of prompts") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        ids = _token_ids(f"{path}, line {number}", line, path.suffix == ".jsonl", tokenizer)
        if ids:
            prompts.append({"prompt_token_ids": ids[:most_tokens]})
    if not prompts:
        raise ConfigError(f"prompts={str(path)!r} holds no prompt. Give some, one a line")
    return prompts


def _token_ids(place: str, line: str, is_json: bool, tokenizer: Any) -> list[int]:
    if not is_json:
        return tokenizer.encode(line)
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not valid JSON: {error.msg}. Correct it there") from error
    key = next((key for key in KEYS if isinstance(row, dict) and key in row), None)
    value = row[key][0] if key == "turns" and isinstance(row[key], list) and row[key] else key and row[key]
    if not isinstance(value, str):
        raise ConfigError(
            f'{place} holds {line:.80} where {{"prompt": "..."}}, {{"text": "..."}} or {{"turns": ["..."]}} is needed'
        )
    if key == "turns" and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": value}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer.encode(value)
