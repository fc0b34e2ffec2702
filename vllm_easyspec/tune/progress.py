"""A progress bar with the time left, and a time budget that is shared out among the phases."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
# What each phase may take of the time, in percent. A phase that is done sooner leaves its rest to those after it.
SHARES = {"start": 8, "score": 7, "acceptance": 20, "times": 20, "confirm": 15, "climb": 10, "compare": 20}


class Progress:
    """The progress bar of a run, and how its time budget is shared out."""

    def __init__(self, seconds: float | None):
        """seconds: the time budget from now on, None where there is none."""
        self.began = time.monotonic()
        self.end = self.began + (seconds or math.inf)
        self.phase = "start"
        self.unfinished: list[str] = []
        self.interrupted = False
        self.bar = tqdm(
            total=sum(SHARES.values()),
            desc=self.phase,
            smoothing=0,
            bar_format="{desc:10} {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}",
        )

    def within(self, phase: str, items: Iterable[T], minimum: int = 1, first_takes: float = 0.0) -> Iterator[T]:
        """Yield the items while the phase has time for the next one; at least `minimum`.

        first_takes: seconds that the first item is expected to take; a later one, what the one before took.
        """
        items = list(items)
        self._enter(phase)
        end = self.now() + (self.end - self.now()) * SHARES[phase] / self._share_from(phase)
        takes = first_takes
        for done, item in enumerate(items):
            began = self.now()
            if done >= minimum and began + takes > end:
                self.unfinished.append(f"{phase}: time for {done} of {len(items)} only")
                return
            yield item
            takes = self.now() - began
            self.bar.update(SHARES[phase] / len(items))

    def interrupt(self) -> None:
        """The user pressed Ctrl-C."""
        self.interrupted = True
        self.unfinished.append(f"{self.phase}: interrupted")

    def give_up(self, why: str) -> None:
        """The phase can't go on."""
        self.unfinished.append(f"{self.phase}: {why}")

    def close(self) -> None:
        self.bar.close()

    def now(self) -> float:
        return time.monotonic()

    def _enter(self, phase: str) -> None:
        """Count all phases before as done, whatever was cut from them."""
        self.phase = phase
        self.bar.set_description_str(phase, refresh=False)
        self.bar.update(sum(SHARES.values()) - self._share_from(phase) - self.bar.n)

    def _share_from(self, phase: str) -> int:
        names = list(SHARES)
        return sum(SHARES[name] for name in names[names.index(phase) :])
