"""Reads a user's YAML and JSON strictly, in bounded time, with errors of one line; writes files whole."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vllm_easyspec.errors import ConfigError, shown

MOST_BYTES = 1 << 20
MOST_YAML_BYTES = 1 << 16  # PyYAML takes a second for as many
MOST_LEVELS = 32


def shipped() -> dict[str, Path]:
    """The configurations that come with this package, by name."""
    package = Path(__file__).parent
    folder = package / "configs"
    if not folder.is_dir():  # a checkout, of which setup.py makes the installed folder
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(value: str | Path) -> Path:
    """The file of a path, or of the name of a shipped configuration. An existing file goes first."""
    path = Path(value).expanduser()
    return path if path.is_file() else shipped().get(str(value), path)


def read_file(path: Path) -> Any:
    """The content of a YAML or JSON file. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        names = f"one of the names {', '.join(shipped())}, " if path.name == str(path) else ""
        raise ConfigError(
            f"speculative_config={str(path)!r} can't be read: {reason}. Give the path of a YAML or JSON file, {names}"
            'inline JSON such as {"method": "easyspec", ...}, or (in Python) a dict'
        ) from error
    return (read_json if path.suffix == ".json" else read_yaml)(text, str(path))


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file at once: it has its old content or all of the new, even if this process is stopped."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_yaml(text: str, source: str) -> Any:
    """Raises `ConfigError` that names `source`, the place and what is wrong there."""
    _check_size(text, source, MOST_YAML_BYTES)
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{source} is not valid YAML: {place}{error.problem}. Correct it there") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: numbers and dates that Python can't represent
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}. Correct it there") from None


def read_json(text: str, source: str) -> Any:
    """Raises `ConfigError` that names `source`, the place and what is wrong there."""
    _check_size(text, source)
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        reason = f"it is nested more than {MOST_LEVELS} levels deep"
    except ValueError as error:
        reason = str(error)
    raise ConfigError(f"{source} is not valid JSON: {reason}. Correct it there") from None


def _check_size(text: str, source: str, most: int = MOST_BYTES) -> None:
    if len(text) > most:
        raise ConfigError(
            f"{source} holds {len(text):,} characters where a configuration has at most {most:,}. Give the "
            "configuration's file"
        )


class _StrictLoader(yaml.SafeLoader):
    """YAML without what makes it ambiguous or unbounded: repeated keys, aliases, deep nesting."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"the alias *{event.anchor}; write the value out", event)
        if self.levels == MOST_LEVELS:
            self._refuse(f"nested more than {MOST_LEVELS} levels deep", event)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                continue  # PyYAML refuses it below
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {shown(name)} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(what: str, event: Any) -> None:
        raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(repeated)} is given twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
