"""Makes an error of easyspec the last line that `vllm serve` prints, whichever of vLLM's processes raised it.

vLLM's processes don't pass errors on: the one that the user started ends with a traceback and "See root cause above".
So a process that raises an error of ours writes its text to a file that the environment names, and the first process
prints it after the traceback. An error of ours in the first process itself is printed without a traceback.
"""

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from vllm_easyspec.errors import ConfigError

FILE = "EASYSPEC_LAST_WORDS"  # of the environment


def print_at_the_end() -> None:
    """Make this process, a command that starts an engine, print the error that ends it. May be repeated."""
    if sys.excepthook is _hook:
        return
    file, name = tempfile.mkstemp(prefix="easyspec-")
    os.close(file)
    os.environ[FILE] = name
    atexit.register(_forget, name)
    sys.excepthook = _hook


@contextmanager
def leaving() -> Iterator[None]:
    """Save the error that ends this block for the first process to print, and raise it."""
    try:
        yield
    except (ConfigError, ValueError) as error:
        if name := os.environ.get(FILE):
            with suppress(OSError):  # another host doesn't have the folder
                Path(name).write_text(" ".join(str(error).split()))
        raise


def _hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, ConfigError):
        text = str(error)
    else:
        sys.__excepthook__(kind, error, traceback)
        text = Path(os.environ[FILE]).read_text()
    if text:
        print(f"easyspec: error: {text}", file=sys.stderr)  # noqa: T201 - the command's own last line


def _forget(name: str) -> None:
    Path(name).unlink(missing_ok=True)
