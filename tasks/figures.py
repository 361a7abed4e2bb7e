"""Figures of stage `validate`, as small PNGs that DVC, MLflow and the report show offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tasks.store import atomic

WIDTH = 6.4
DPI = 110


def spectra(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Λ of every layer, from the largest down, relative to its mean."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(curves)))
    for (name, values), colour in zip(curves.items(), colours, strict=True):
        share = np.linspace(0, 100, len(values))
        axes.semilogy(share, np.array(values) / np.mean(values), color=colour, label=name, lw=1)
    axes.axhline(0.1, color="0.4", lw=0.8, ls="--")
    axes.annotate("λ = 0.1 · mean Λ", (100, 0.1), ha="right", va="bottom", color="0.3", fontsize=8)
    axes.set(xlabel="eigenvalues, % from the largest", ylabel="Λ / its mean (thinned)")
    axes.set_title("Corrected eigenvalues by layer (dark: first)", fontsize=10)
    save(figure, path)


def halves(first: ArrayLike, second: ArrayLike, pearson: float, path: Path) -> None:
    """Scores from one half of the data against the other half's, each query scaled to 1."""
    x, y = np.asarray(first), np.asarray(second)
    scale = np.abs(np.concatenate([x, y], axis=1)).max(axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(4.2, 4.2))
    axes.plot([-1, 1], [-1, 1], color="0.7", lw=0.8)
    axes.scatter(x / scale, y / scale, s=4, alpha=0.4, lw=0, color="#2b6cb0")
    axes.set(xlabel="influence, curvature from half A", ylabel="influence, curvature from half B")
    axes.set_title(f"Split-half agreement, mean Pearson {pearson:.3f}", fontsize=10)
    save(figure, path)


def agreement(rows: Mapping[str, tuple[float, float, float]], path: Path) -> None:
    """Pearson with EK-FAC of each baseline, with its interval over queries."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.6 + 0.5 * len(rows)))
    for place, (name, (mean, low, high)) in enumerate(rows.items()):
        axes.plot([low, high], [place, place], color="#2b6cb0", lw=2)
        axes.plot(mean, place, "o", color="#2b6cb0")
        axes.annotate(f" {name}", (high, place), va="center", fontsize=9)
    axes.axvline(0, color="0.7", lw=0.8)
    axes.set(yticks=[], xlim=(-0.3, 1.15), ylim=(-0.6, len(rows) - 0.4))
    axes.set_xlabel("Pearson with EK-FAC over the candidates, 95 % interval over queries")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """In the style of all figures; a PNG whose bytes depend on what it shows alone."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_dpi(DPI)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Sixteen levels a colour: nobody sees it, and the file is half as large.
    colours = (np.asarray(canvas.buffer_rgba())[..., :3].astype(np.uint16) + 8) // 17 * 17
    with atomic(path) as hidden:
        # No version or date inside: equal figures are equal bytes.
        plt.imsave(hidden, colours.astype(np.uint8), format="png", metadata={"Software": None})
    plt.close(figure)
