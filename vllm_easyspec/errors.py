"""Errors that a user reads as one line, and how values are told in them."""

from typing import Any

SHOWN = 120  # characters of a value in a message


class CommandError(Exception):
    """A command can't do as asked, or found what must not be. The message says all that a user needs."""


class ConfigError(ValueError):
    """A configuration that can't be used. The message is one line: field, value, what is allowed, remedy."""


def shown(value: Any) -> str:
    """`value` for a message, cut short where it is long."""
    if isinstance(value, list | tuple) and len(value) > SHOWN:
        value = value[:SHOWN]  # enough to be cut below, and never written whole
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of more than {SHOWN} digits"
    return cut(text)


def cut(text: str) -> str:
    """The beginning of a long text, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
