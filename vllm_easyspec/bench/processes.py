"""One process per engine: whatever an engine leaves behind, above all memory, ends with its process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)`, importable by name, in a new process. Its exceptions are raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
