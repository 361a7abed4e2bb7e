"""How the cost grows: one axis at a time, seconds against size, and the exponent between them."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import growth, table
from benchmarks.clock import Work, seconds
from benchmarks.models import Shape
from benchmarks.phases import Setting, ours, stream_work

REPEATS = 5
SMALL = Setting(Shape(4, 256, 4, 1024), length=128, num_sequences=8)
Point = tuple[int, Work]


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied, over which sizes, and what is done at each."""

    name: str
    phase: str
    points: Callable[[], Iterator[Point]]


def axes() -> list[Axis]:
    """Tokens of a sequence, queries, rank, width of the model; workers are told apart."""
    found = []
    for phase in ("factors", "lambda", "stream 8"):
        for name, settings in (
            ("tokens", [replace(SMALL, length=length) for length in (64, 128, 256, 512)]),
            ("width", [replace(SMALL, shape=wide(width)) for width in (128, 256, 512, 768)]),
        ):
            found.append(Axis(name, phase, lambda s=settings, p=phase, n=name: _points(s, p, n)))
    found.append(Axis("queries", "stream", lambda: _streams([(q, 32) for q in (8, 32, 128, 512)])))
    found.append(Axis("rank", "stream", lambda: _streams([(8, r) for r in (4, 16, 64, 256)])))
    return found


def wide(width: int) -> Shape:
    """A GPT-2 of four blocks."""
    return Shape(4, width, 4, 4 * width)


def _points(settings: Sequence[Setting], phase: str, name: str) -> Iterator[Point]:
    for setting in settings:
        [work] = ours(setting, [phase]).values()
        yield (setting.length if name == "tokens" else setting.shape.width), work


def _streams(sizes: Sequence[tuple[int, int]]) -> Iterator[Point]:
    """Queries and rank; the size is that of the two which is varied."""
    varied = 0 if len({rank for _, rank in sizes}) == 1 else 1
    for size in sizes:
        yield size[varied], stream_work(SMALL, *size)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def measured(axis: Axis, repeats: int = REPEATS) -> dict[str, Any]:
    """Median seconds at each size, in turn within a repeat, and the exponent."""
    points = list(axis.points())
    taken: list[list[float]] = [[] for _ in points]
    for number in range(-1, repeats):
        for at, (_, work) in enumerate(points):
            once = seconds(work.call)
            if number >= 0:
                taken[at].append(once)
    sizes = [size for size, _ in points]
    costs = [statistics.median(each) for each in taken]
    return {
        "axis": axis.name, "phase": axis.phase, "sizes": sizes, "seconds": costs,
        "exponent": exponent(sizes, costs),
    }  # fmt: skip


def workers(setting: Setting, num_workers: int, repeats: int = REPEATS) -> float:
    """Throughput of shards by so many threads over that of one, each thread with its modules.

    As a stage does it: every worker has a model of its own and one thread of arithmetic.
    """
    halves = [
        replace(setting, num_sequences=setting.num_sequences // num_workers)
        for _ in range(num_workers)
    ]
    works = [stream_work(half, 8, 32) for half in halves]

    def alone() -> None:
        for work in works:
            work.call()

    def together() -> None:
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(lambda work: work.call(), works))

    ratios = []
    for number in range(-1, repeats):
        ratio = seconds(alone, side_by_side=True) / seconds(together, side_by_side=True)
        if number >= 0:
            ratios.append(ratio)
    return statistics.median(ratios)


def main(keep: Path | None = None) -> None:
    """Print a JSON line for each axis, all on one thread; `keep`: where docs/engine is written."""
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        lines.append({"machine": table.machine()} | line)
        print(json.dumps(lines[-1]), flush=True)

    for axis in axes():
        tell(measured(axis))
    gain = workers(Setting(), 2)
    tell({"axis": "workers", "phase": "stream 8", "two_over_one": gain})
    if keep is not None:
        growth.keep(keep / table.FOLDER, lines)
        table.write(keep)
