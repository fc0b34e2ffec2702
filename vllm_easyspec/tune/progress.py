"""A progress bar with the time left, and a time budget that is divided among the phases."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
# Each phase's share of the time, in percent. A phase that ends early leaves the rest to those after it.
SHARES = {"start": 8, "score": 7, "acceptance": 20, "times": 20, "confirm": 15, "climb": 10, "compare": 20}


class Progress:
    """The progress bar of a run, and its time budget."""

    def __init__(self, seconds: float | None):
        """seconds: the time budget from now on, None for no limit."""
        self.began = time.monotonic()
        self.end = self.began + (seconds or math.inf)
        self.phase = "start"
        self.unfinished: list[str] = []
        self.interrupted = False
        self.bar = tqdm(
            total=sum(SHARES.values()),
            desc=self.phase,
            smoothing=0,
            miniters=0,  # shown after each item, however little of a phase it is
            bar_format="{desc:10} {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}",
        )

    def within(self, phase: str, items: Iterable[T], minimum: int = 1, first_takes: float = 0.0) -> Iterator[T]:
        """Yield the items while the phase has time for the next one; at least `minimum`.

        first_takes: expected seconds of the first item; later ones are expected to take as long as the one before.
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
        """The phase can't continue."""
        self.unfinished.append(f"{self.phase}: {why}")

    def close(self) -> None:
        self.bar.close()

    def now(self) -> float:
        return time.monotonic()

    def _enter(self, phase: str) -> None:
        """Count all earlier phases as done, even if they were cut short."""
        self.phase = phase
        self.bar.set_description_str(phase, refresh=False)
        self.bar.update(sum(SHARES.values()) - self._share_from(phase) - self.bar.n)

    def _share_from(self, phase: str) -> int:
        names = list(SHARES)
        return sum(SHARES[name] for name in names[names.index(phase) :])
