"""How far a map of shards is: items done of all, items a second, time left."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

QUIET = 10.0  # seconds after which a line is told though no shard has ended


def say(line: str) -> None:
    """To the terminal, at once and in one piece: standard output is a pipe under DVC."""
    try:
        print(f"{line}\n", end="", flush=True)
    except BrokenPipeError:
        # Who listened is gone (a killed worker, a closed terminal): the work goes on, untold.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Counts items as shards tick and end; those found finished do not count for the speed.

    Any thread may tick. A line is told as each shard ends, and by `tell_if_quiet`.
    """

    def __init__(
        self,
        label: str,
        sizes: Sequence[int],
        tell: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
        items: str = "items",
    ) -> None:
        """`sizes`: items in each shard. `tell`: what to do with a line. `items`: what they are."""
        self._label, self._sizes, self._items = label, sizes, items
        self._tell, self._clock = tell, clock
        self._started = self._told = clock()
        self._told_items = 0
        self._lock = threading.Lock()
        self._ended = set[int]()
        self._ticked = [0] * len(sizes)  # items, by shard
        self._cached = [0] * len(sizes)  # of them found finished

    def tick(self, index: int, num_items: int, cached: bool = False) -> None:
        """Tell that a shard is so many items further; one that starts again counts up again.

        `cached`: the items were done before, and do not count for the speed.
        """
        with self._lock:
            before = self._ticked[index]
            self._ticked[index] = min(before + num_items, self._sizes[index])
            self._cached[index] += self._ticked[index] - before if cached else 0

    def shard_done(self, index: int, cached: bool) -> None:
        """Tell that a shard ended; `cached`: its file was there already."""
        with self._lock:
            self._ended.add(index)
            self._ticked[index] = self._sizes[index]
            self._cached[index] = self._sizes[index] if cached else self._cached[index]
            self._told, self._told_items = self._clock(), sum(self._ticked)
            what = f"shard {index + 1} was there already" if cached else ""
            line = self._line(self._told, what)
        self._tell(line)

    def tell_if_quiet(self) -> None:
        """A line if items were done, but none was told for `QUIET` seconds."""
        now = self._clock()
        with self._lock:
            if now - self._told < QUIET or sum(self._ticked) == self._told_items:
                return
            self._told, self._told_items = now, sum(self._ticked)
            line = self._line(now)
        self._tell(line)

    def standing(self) -> tuple[int, float, str]:
        """Items done, the same in percent, and the whole as a phrase for a progress bar."""
        with self._lock:
            done, phrase = sum(self._ticked), self._phrase(self._clock())
        return done, round(100 * done / sum(self._sizes), 1), phrase

    def _line(self, now: float, what: str = "") -> str:
        shards = f"{self._label}: {len(self._ended)} of {len(self._sizes)} shards"
        return f"{shards}, {self._done()}; {what}" if what else f"{shards}, {self._phrase(now)}"

    def _phrase(self, now: float) -> str:
        done, total = sum(self._ticked), sum(self._sizes)
        rate = (done - sum(self._cached)) / max(now - self._started, 1e-9)
        if not rate:
            return self._done()
        left = duration((total - done) / rate)
        return f"{self._done()}, {_short(rate)} {self._items}/s, {left} left"

    def _done(self) -> str:
        return f"{sum(self._ticked)} of {sum(self._sizes)} {self._items}"


def _short(rate: float) -> str:
    """Three digits that count: `0.0312`, `35.2`, `1204`."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """Seconds for people: `0.4 s`, `48 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
