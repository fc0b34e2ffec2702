"""Errors that a user reads as one line, and how values are shown in them."""

from typing import Any

SHOWN = 120  # characters of a value in a message


class CommandError(Exception):
    """A command can't do what was asked, or found a fault. The message is all that the user needs to see."""


class ConfigError(ValueError):
    """A configuration that can't be used. The message is one line: field, value, what is allowed, remedy."""


def shown(value: Any) -> str:
    """`value` for a message, cut short where it is long."""
    if isinstance(value, list | tuple) and len(value) > SHOWN:
        value = value[:SHOWN]  # repr of a huge list would be slow; this is cut below
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a number of more than {SHOWN} digits"
    return cut(text)


def cut(text: str) -> str:
    """`text`, or the beginning of a long one, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
