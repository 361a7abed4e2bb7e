"""The sweeps of a seed: dampings, ranks, blocks of A and S, and examples fitted on.

Names are `sweep/<which>/<method>/<x>`. All points of a sweep are more preconditioned copies of the
same query gradients, so that one pass over the training examples scores them all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from influence.damping import RelativeDamping
from influence.lowrank import LowRank
from influence.solver import Blocks, Blockwise
from influence.validation.estimators import Curvature, fit_curvature
from influence.validation.nystrom import Nystrom
from tasks.validation.context import BenchmarkContext
from tasks.validation.datasets import random_generator
from tasks.validation.subject import Subject

LEFT_OUT = 0.05  # of λ: a sketch that leaves more out of G than this is not called exact


def sweep(
    context: BenchmarkContext,
    subject: Subject,
    gradients: Blocks,
    fitted: Curvature,
    sketch: Nystrom,
    dampings: Mapping[str, float],
    seed: int,
) -> dict[str, dict[str, Tensor]]:
    """Preconditioned query gradients of every point, by name."""
    given = context.params.estimators
    points = _dampings(given.damping_ratios, subject, gradients, fitted, sketch)
    full = Blockwise(fitted.ekfac).solve(gradients, dampings)
    for rank in given.ranks:
        points[f"sweep/rank/ekfac/{rank}"] = {
            name: LowRank.of(V, rank).dense() for name, V in full.items()
        }
    for blocks in given.splits:
        split = (
            fitted
            if blocks == 1
            else fit_curvature(
                subject.model, subject.layers, subject.batches(), seed, given.draws, blocks
            )
        )
        points[f"sweep/split/ekfac/{blocks}"] = Blockwise(split.ekfac).solve(gradients, dampings)
    order = torch.randperm(subject.num_examples, generator=random_generator(seed, "fit"))
    for size in given.fit_sizes:
        if size <= subject.num_examples:
            part = fit_curvature(
                subject.model,
                subject.layers,
                subject.batches(order[:size].sort().values),
                seed,
                given.draws,
            )
            points[f"sweep/fit/ekfac/{size}"] = Blockwise(part.ekfac).solve(gradients, dampings)
    return points


def _dampings(
    ratios: tuple[float, ...],
    subject: Subject,
    gradients: Blocks,
    fitted: Curvature,
    sketch: Nystrom,
) -> dict[str, dict[str, Tensor]]:
    """EK-FAC, K-FAC and, where it is exact, the sketched Gauss-Newton matrix at each damping."""
    points, tail = {}, sketch.tail
    solvers = {"ekfac": Blockwise(fitted.ekfac), "kfac": Blockwise(fitted.kfac()), "exact": sketch}
    for ratio in ratios:
        dampings = fitted.dampings(RelativeDamping(ratio))
        for method, solver in solvers.items():
            if method == "exact" and tail > LEFT_OUT * min(dampings.values()):
                continue
            points[f"sweep/damping/{method}/{ratio:g}"] = solver.solve(gradients, dampings)
    return points


def memory_share(subject: Subject, blocks: int) -> float:
    """Numbers kept for A, S and Λ with O blocks, over those with one (Eq. 27 of the paper)."""

    def numbers(parts: int) -> float:
        return sum(
            layer.d_in**2 / min(parts, layer.d_in)
            + layer.d_out**2 / min(parts, layer.d_out)
            + layer.d_in * layer.d_out
            for layer in subject.layers
        )

    return numbers(blocks) / numbers(1)


def split_name(name: str) -> tuple[str, str, float]:
    """Which sweep, which method, which x, of a point's name."""
    _, which, method, x = name.split("/")
    return which, method, float(x)


def points_of(names: Mapping[str, object], which: str) -> list[tuple[str, str, float]]:
    """(name, method, x) of the points of one sweep, by x."""
    found = [
        (name, *split_name(name)[1:])
        for name in names
        if name.startswith("sweep/") and split_name(name)[0] == which
    ]
    return sorted(found, key=lambda point: (point[1], point[2]))
