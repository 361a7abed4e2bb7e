"""A line as each shard ends: done of all, items a second, time left."""

import time
from collections.abc import Callable, Sequence


def say(line: str) -> None:
    """To the terminal, at once: standard output is a pipe under DVC."""
    print(line, flush=True)


class Progress:
    """Counts shards as they end; those found finished do not count for the speed."""

    def __init__(
        self,
        label: str,
        sizes: Sequence[int],
        tell: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sizes`: items in each shard. `tell`: what to do with a line."""
        self._label, self._sizes, self._tell, self._clock = label, sizes, tell, clock
        self._started = clock()
        self._shards = self._items = self._computed = 0

    def shard_done(self, index: int, cached: bool) -> None:
        """Tell that a shard ended; `cached`: its file was there already."""
        size = self._sizes[index]
        self._shards += 1
        self._items += size
        self._computed += 0 if cached else size
        self._tell(self._line(index, cached))

    def _line(self, index: int, cached: bool) -> str:
        total = sum(self._sizes)
        seconds = max(self._clock() - self._started, 1e-9)
        line = (
            f"{self._label}: {self._shards} of {len(self._sizes)} shards, "
            f"{self._items} of {total} items"
        )
        if cached:
            return f"{line}; shard {index + 1} was there already"
        rate = self._computed / seconds
        left = (total - self._items) / rate if rate else 0.0
        return f"{line}, {_rate(rate)}, {duration(left)} left"


def _rate(rate: float) -> str:
    return f"{rate:.0f} items/s" if rate >= 10 else f"{rate:.2g} items/s"


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
