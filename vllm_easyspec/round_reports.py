"""Sends a worker's counts and times to the API server, for vLLM's `/metrics` and its log.

About once per second the worker of rank 0 sends what is new, as one datagram of JSON, to a Unix socket that the API
server's stat logger reads. The sender never waits for the device, nor for a reader, which an offline engine doesn't
have.
"""

import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_easyspec.metrics import DraftStatistics

FOLDER = "EASYSPEC_ROUND_REPORTS"  # of the environment: a folder with a socket for each engine
SECONDS = 1.0  # between two reports
COUNTERS = ("paused_rounds", "caught_up_tokens", "eager_rounds", "replays")


def make_folder() -> None:
    """Create a folder for the sockets, and name it in the environment of child processes. May be repeated."""
    if FOLDER in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="easyspec-")
    os.environ[FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def address(engine_index: int) -> str | None:
    """The socket's path; None if no process created a folder."""
    folder = os.environ.get(FOLDER)
    return None if folder is None else str(Path(folder) / str(engine_index))


class RoundReporter:
    """Sends the rounds of one engine."""

    def __init__(self, engine_index: int):
        self.address = address(engine_index)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.due = time.monotonic() + SECONDS
        self.counted: Counter[Any] = Counter()  # at the last report

    def after_round(self, statistics: "DraftStatistics") -> None:
        """Report what has happened since the last report, if that is long enough ago."""
        now = time.monotonic()
        if now < self.due or self.address is None:
            return
        self.due = now + SECONDS
        report = json.dumps(self._new(statistics)).encode()
        with contextlib.suppress(OSError):  # no reader, or one that is too slow
            self.socket.sendto(report, self.address)

    def _new(self, statistics: "DraftStatistics") -> dict[str, Any]:
        counts: Counter[Any] = Counter({name: getattr(statistics, name) for name in COUNTERS})
        counts.update(statistics.warnings)
        counts.update(statistics.rounds_by_plan)
        # Counts that went down were reset by `easyspec_stats`.
        new = {key: count - self.counted[key] if count >= self.counted[key] else count for key, count in counts.items()}
        self.counted = counts
        return {
            "stage_seconds": statistics.clock.take_finished(),
            "counters": {name: count for name, count in new.items() if isinstance(name, str)},
            "rounds": [
                [num_drafts, plan.scope, plan.grouping, new[num_drafts, plan]]
                for num_drafts, plan in statistics.rounds_by_plan
            ],
        }
