"""Figures of a benchmark, as small PNGs: agreement by method, its price, and what it depends on.

Colours are Okabe and Ito's, which the colour-blind can tell apart, with a marker for each as well.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from influence.statistics import Agreement
from tasks.figures import DPI, save
from tasks.validation import labels
from tasks.validation.outcome import MethodOutcome, Outcome, Point

WIDTH = 800 / DPI
QUERIES = 10  # that the time of `against_time` is for, as in Grosse et al. 2023, Fig. 7
FASTEST = 1e-4  # seconds; what took less stands there: the axis is logarithmic
SHOWN = 1500  # examples of a scatter's panel; correlations are of all of them
CURVES = {"lissa": "depth", "astra": "iterations"}
POINTS = ("gradient_dot", "diagonal", "kfac", "ekfac", "exact")
UNSCALED = {"gradient_dot", "cosine", "bm25", "tfidf", "hidden_cosine"}  # not in nats
GREY, FAILED = "#888888", "#D55E00"
STYLES = {
    "gradient_dot": ("#CC79A7", "v"),
    "cosine": ("#CC79A7", "^"),
    "diagonal": ("#E69F00", "D"),
    "kfac": ("#56B4E9", "s"),
    "ekfac": ("#0072B2", "o"),
    "lissa": ("#D55E00", "P"),
    "astra": ("#009E73", "X"),
    "exact": ("#000000", "*"),
}
SWEEPS = {
    "dampings": ("damping ÷ mean eigenvalue", "the exact influence at the same damping"),
    "ranks": ("rank of the query gradients", "full rank"),
    "splits": ("O, blocks of A and S, and the memory", "one block"),
    "fit_sizes": ("examples the curvature is fitted on", "all examples"),
}


def correlation(outcome: Outcome, path: Path) -> None:
    """Pearson with the PBRF by method, the best on top (Grosse et al. 2023, Fig. 6).

    A method without a number is a line that says so.
    """
    methods = sorted(outcome.methods.items(), key=lambda item: _height(item[1]))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + 0.36 * len(methods)))
    found = [each.truth for _, each in methods if each.truth]
    left = min([0.0, *(each.low for each in found)])
    for place, (name, each) in enumerate(methods):
        _bar(axes, place, name, each)
    axes.set_yticks(range(len(methods)), [labels.method(name) for name, _ in methods])
    axes.set(xlim=(left, 1.0), ylim=(-0.7, len(methods) - 0.4))
    axes.set_xlabel(f"Pearson with the PBRF: mean and 95 % interval over {_queries(outcome)}")
    axes.set_title(f"{outcome.title} (ticks: each seed)", fontsize=10)
    save(figure, path)


def _bar(axes: Axes, place: int, name: str, each: MethodOutcome) -> None:
    if each.truth is None:
        axes.annotate(f"failed: {_short(each.failed)}", (0, place), xytext=(5, 0), va="center",
                      textcoords="offset points", color=FAILED, fontsize=8)  # fmt: skip
        return
    colour, marker = STYLES.get(name, (GREY, "o"))
    mean = each.truth.pearson
    axes.barh(place, mean, height=0.26, color=colour, alpha=0.25)
    axes.plot([each.truth.low, each.truth.high], [place, place], color=colour, lw=2)
    seeds = [pearson for pearson in each.by_seed if pearson is not None]
    axes.plot(seeds, [place - 0.28] * len(seeds), "|", color="0.35", ms=4)
    axes.plot(mean, place, marker, color=colour, ms=6.5, clip_on=False)
    axes.annotate(f"{mean:.3f}", (1.02, place), va="center", fontsize=8.5,
                  xycoords=("axes fraction", "data"))  # fmt: skip


def _short(reason: str | None) -> str:
    first = (reason or "no reason was given").splitlines()[0]
    return first if len(first) <= 64 else f"{first[:63]}…"


def _height(each: MethodOutcome) -> float:
    return -2.0 if each.truth is None else each.truth.pearson


def _queries(outcome: Outcome) -> str:
    """`30 queries (3 seeds)`, as the correlations count them."""
    counts = {each.truth.num_queries for each in outcome.methods.values() if each.truth}
    seeds = f"{len(outcome.seeds)} seed{'s' * (len(outcome.seeds) != 1)}"
    return f"{'–'.join(map(str, sorted(counts))) or 'no'} queries ({seeds})"


def against_time(outcome: Outcome, path: Path) -> None:
    """Correlation against seconds for ten queries, fitting included (Grosse et al. 2023, Fig. 7).

    A depth that failed is a cross at the foot.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    for name in POINTS:
        each = outcome.methods.get(name)
        if each and each.truth:
            seconds = max(FASTEST, each.fit_seconds + QUERIES * each.query_seconds)
            _interval(axes, name, [(seconds, each.truth)], labels.method(name))
    for name, each in CURVES.items():
        _curve(axes, outcome, name, each)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(top=1.03)
    axes.grid(color="0.92", lw=0.6)
    axes.set_xlabel(f"seconds for {QUERIES} queries, fitting included")
    axes.set_ylabel("Pearson with the PBRF")
    axes.set_title(f"{outcome.title}, {_queries(outcome)}", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5)
    save(figure, path)


def _curve(axes: Axes, outcome: Outcome, name: str, what: str) -> None:
    method = outcome.methods.get(name)
    fit = method.fit_seconds if method else 0.0
    points = [each for each in getattr(outcome, name) if each.method == name]
    timed = [(max(FASTEST, fit + QUERIES * each.seconds), each) for each in points]
    label = f"{labels.method(name)} by {what}"
    _interval(axes, name, [(time, each.truth) for time, each in timed if each.truth], label)
    colour, _ = STYLES[name]
    for time, each in timed:
        if each.truth is None:
            axes.plot([time], [0.03], "x", color=colour, transform=axes.get_xaxis_transform())
            _number(axes, f"{each.x:g} failed", (time, 0.03), colour, in_axes=True)
        elif each in (points[0], points[-1]):
            _number(axes, f"{each.x:g}", (time, each.truth.pearson), colour)


def _number(
    axes: Axes, text: str, place: tuple[float, float], colour: str, in_axes: bool = False
) -> None:
    """Above a point; `in_axes`: its height is a share of the axes'."""
    coordinates = axes.get_xaxis_transform() if in_axes else axes.transData
    axes.annotate(text, place, xycoords=coordinates, xytext=(0, 7), textcoords="offset points",
                  ha="center", color=colour, fontsize=8)  # fmt: skip


def _interval(
    axes: Axes, name: str, rows: Sequence[tuple[float, Agreement]], label: str, line: str = "-"
) -> None:
    """Means with intervals at x, joined by a line."""
    if not rows:
        return
    colour, marker = STYLES.get(name, (GREY, "o"))
    x, means = [x for x, _ in rows], [each.pearson for _, each in rows]
    # A bootstrap interval need not hold its mean.
    below = [max(0.0, each.pearson - each.low) for _, each in rows]
    above = [max(0.0, each.high - each.pearson) for _, each in rows]
    axes.errorbar(x, means, [below, above], color=colour, marker=marker, ls=line, lw=1.2,
                  ms=9 if marker == "*" else 6, elinewidth=1, label=label)  # fmt: skip


def scatter(
    estimates: Mapping[str, NDArray[np.floating]], truth: NDArray[np.floating], path: Path
) -> None:
    """Estimate against PBRF, a panel a method, each query scaled to 1 on both axes.

    Args:
        estimates: [queries, examples] by method.
        truth: [queries, examples], nats per copy.
        path: where to.
    """
    figure, panels = _panels(len(estimates), height=2.9)
    step = -(-truth.shape[1] * truth.shape[0] // SHOWN)
    for axes, (name, estimate) in zip(panels, estimates.items(), strict=True):
        pearson = np.mean([_pearson(*rows) for rows in zip(estimate, truth, strict=True)])
        x, y = (_scaled(each).ravel()[::step] for each in (truth, estimate))
        axes.axline((0, 0), slope=1, color="0.75", lw=0.8)
        colour, _ = STYLES.get(name, (GREY, "o"))
        axes.scatter(x, y, s=7, alpha=0.35, lw=0, color=colour)
        axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axes.set_xlabel("PBRF")
        slope = "" if name in UNSCALED else f", slope {_slope(estimate, truth):.2f}"
        axes.set_title(f"{labels.method(name)}: r = {pearson:.3f}{slope}", fontsize=9)
    panels[0].set_ylabel("estimate")
    figure.suptitle(f"Each of {len(truth)} queries scaled to 1", fontsize=9, color="0.3")
    save(figure, path)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Two in a row; what is left over of the last row is hidden."""
    columns = min(2, count)
    rows = -(-count // columns)
    shape = (WIDTH, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=shape, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _pearson(estimate: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Of one query; NaN where either is constant."""
    x, y = estimate - estimate.mean(), truth - truth.mean()
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm > 0 else float("nan")


def _scaled(values: NDArray[np.floating]) -> NDArray[np.floating]:
    largest = np.abs(values).max(axis=1, keepdims=True)
    return values / np.where(largest > 0, largest, 1)


def _slope(estimate: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Median over queries of the least-squares slope of the estimate over the truth."""
    norms = (truth**2).sum(axis=1)
    return float(np.median((estimate * truth).sum(axis=1) / np.where(norms > 0, norms, 1)))


def sweeps(outcome: Outcome, path: Path) -> None:
    """Agreement over damping, rank, blocks and examples of the fit (Grosse et al. 2023, Fig. 30).

    Solid: with the PBRF at the benchmark's own damping; dashed: with the sweep's own reference.
    """
    swept = [name for name in SWEEPS if getattr(outcome, name)]
    figure, panels = _panels(max(1, len(swept)), height=2.7)
    if not swept:
        panels[0].annotate("nothing was swept", (0.5, 0.5), ha="center")
        panels[0].set_axis_off()
    for axes, name in zip(panels, swept, strict=False):
        _sweep(axes, name, getattr(outcome, name))
    told = f"{outcome.title}, {_queries(outcome)}\nPearson; solid: with the PBRF"
    figure.suptitle(told, fontsize=9)
    save(figure, path)


def _sweep(axes: Axes, name: str, points: Sequence[Point]) -> None:
    what, reference = SWEEPS[name]
    agreements: tuple[tuple[str, Callable[[Point], Agreement | None]], ...] = (
        ("-", lambda point: point.truth),
        ("--", lambda point: point.reference),
    )
    axes.set_xscale("log")
    by_method = sorted(points, key=lambda point: (point.method, point.x))
    for method, group in groupby(by_method, key=lambda point: point.method):
        some = list(group)
        for line, agreement in agreements:
            rows = [(point.x, found) for point in some if (found := agreement(point))]
            _interval(axes, method, rows, labels.method(method), line)
    notes = {point.x: "" for point in by_method}
    notes |= {point.x: point.note for point in by_method if point.note and _has_number(point)}
    ticks = [f"{x:g}\n{note}".strip() for x, note in notes.items()]
    axes.set_xticks(list(notes), ticks, fontsize=8)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(what, fontsize=9)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    one = f"{next(iter(named))}; " if len(named) == 1 else ""
    axes.set_title(f"{one}dashed: with {reference}", fontsize=8.5, color="0.3")
    if len(named) > 1:
        axes.legend(named.values(), named, frameon=False, fontsize=8, loc="best")


def _has_number(point: Point) -> bool:
    return point.truth is not None or point.reference is not None
