"""The error that every command reports as one line."""


class CommandError(Exception):
    """A command can't do as asked, or found what must not be. The message says all that a user needs."""
