"""Interleaved timing, and the peak memory of a call."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time, and how many tokens it goes through."""

    call: Callable[[], object]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Cost per token over that of the unit, of each repeat."""

    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.repeats), max(self.repeats)


def ratios(
    unit: Work,
    works: Mapping[str, Work],
    repeats: int,
    warm_up: bool = True,
    told: Callable[[str, float], object] = lambda name, ratio: None,
) -> dict[str, Ratio]:
    """Each work against the unit, which runs before and after it: the machine's speed drifts.

    Args:
        unit: what costs 1 a token.
        works: what is measured, in turn, once each repeat.
        repeats: how often.
        warm_up: run everything once, uncounted, before.
        told: hears of each ratio as soon as it is measured.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm_up, repeats):
        gc.collect()
        before = seconds(unit.call)
        for name, work in works.items():
            taken = seconds(work.call)
            after = seconds(unit.call)
            one = (before + after) / 2 / unit.num_tokens
            before = after
            if number >= 0:
                found[name].append(taken / work.num_tokens / one)
                told(name, found[name][-1])
    return {name: Ratio(tuple(each)) for name, each in found.items()}


def seconds(call: Callable[[], object], side_by_side: bool = False) -> float:
    """Time of a call; all that it queued on an accelerator is done.

    On the wall, or where one thread of a CPU does all the work, of the process on it: what other
    guests of the machine take is no part of the cost.

    Args:
        call: what is timed.
        side_by_side: it has threads of its own, so that the wall alone tells.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available() and not side_by_side
    now = time.process_time if alone else time.perf_counter
    _synchronise()
    started = now()
    call()
    _synchronise()
    return now() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(call: Callable[[], object]) -> float | None:
    """How far memory rises above where it stood, in MiB; None where this system cannot tell.

    Of the device where there is one, else of the process (Linux). Run each in a process of its
    own: what an earlier call gave back, the allocator may still hold.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset.write_text("5", encoding="ascii")  # the high-water mark starts again from what is held
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines: Sequence[str] = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1])
