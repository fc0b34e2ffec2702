"""Options of a command: a dataclass that declares each option once, from which the parser is made."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from vllm_easyspec.drafter.plan import parse_grouping

Options = TypeVar("Options")
DTYPES = ("bfloat16", "float16", "float32")


def option(help: str = "", *flags: str, default: Any = dataclasses.MISSING, **arguments: Any) -> Any:
    """A field of a dataclass of options.

    flags: by default `--` and the field's name; without dashes the option is positional. arguments: more
    arguments of `add_argument`; `type` is needed if the field's type is not str, int, float or Path, or one of them or
    None.
    """
    return dataclasses.field(default=default, metadata={"flags": flags, "help": help, "arguments": arguments})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add the options of a dataclass to a parser."""
    types = get_type_hints(options)
    for field in dataclasses.fields(options):
        flags = field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)
        arguments = {"help": field.metadata["help"], **field.metadata["arguments"]}
        if field.default is not dataclasses.MISSING:
            arguments["default"] = field.default
            if field.default not in (None, ()):
                shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
                arguments["help"] += f" (default: {shown})"
        if flags[0].startswith("-"):
            arguments |= {"dest": field.name, "required": field.default is dataclasses.MISSING}
        own_type = types[field.name]
        if isinstance(own_type, UnionType):
            own_type = get_args(own_type)[0]
        if own_type in (int, float, Path):
            arguments.setdefault("type", own_type)
        parser.add_argument(*flags, **arguments)


def parsed(options: type[Options], arguments: argparse.Namespace) -> Options:
    """The options that the parser found, with lists as tuples."""
    found = {name: value for name, value in vars(arguments).items() if name in get_type_hints(options)}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def as_json(options: Any, *hidden: str) -> dict[str, Any]:
    """Options for a result's file, without the `hidden` ones."""
    names = [field.name for field in dataclasses.fields(options) if field.name not in hidden]
    values = {name: getattr(options, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


# ---- types of options ----


def at_least(least: int) -> Callable[[str], int]:
    """An integer of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def integers(text: str) -> tuple[int, ...]:
    """Integers of at least 1, such as 1,4,16."""
    return tuple(map(at_least(1), text.split(",")))


def names(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """Some of the names, such as a,b; none in an empty text."""

    def some(text: str) -> tuple[str, ...]:
        found = tuple(name for name in text.split(",") if name)
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(allowed)}")
        return found

    return some


def grouping(text: str) -> tuple[int, ...]:
    """Group sizes, such as 1-4-4-1."""
    try:
        return parse_grouping(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
