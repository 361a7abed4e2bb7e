"""Every estimator and baseline of one seed: scores of all training examples, and what they cost."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.objectives import log_probability, training_loss
from influence.scores import influence
from influence.solver import Blocks, Blockwise, Solver
from influence.validation.astra import ASTRA
from influence.validation.estimators import (
    Curvature,
    fit_curvature,
    fit_diagonal,
    gradient_dot,
)
from influence.validation.ggn import ExactGaussNewton
from influence.validation.gradients import inner_products, measurement_gradients, squared_norms
from influence.validation.lissa import LiSSA, schedule
from tasks import store
from tasks.shards import ShardRef
from tasks.validation.context import BenchmarkContext
from tasks.validation.similarity import similarities
from tasks.validation.subject import Subject, open_subject
from tasks.validation.sweeps import sweep
from tasks.validation.truth import open_sketch

CG_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(slots=True)
class Notebook:
    """What a seed's estimators said: scores by name, seconds by name, failures by name."""

    subject: Subject
    scores: dict[str, Float[Tensor, "q n"]] = field(default_factory=dict)
    fit_seconds: dict[str, float] = field(default_factory=dict)
    solve_seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def score(self, prepared: Blocks) -> Float[Tensor, "q n"]:
        """Influence of every training example, from preconditioned query gradients."""
        subject = self.subject
        raw = inner_products(subject.model, subject.layers, prepared, subject.train)
        return influence(raw.double(), subject.num_examples)

    def solve(
        self, name: str, solver: Solver, gradients: Blocks, dampings: Mapping[str, float]
    ) -> dict[str, Tensor] | None:
        """Solve, score and time one estimator; a failure is noted with its sentence."""
        started = time.perf_counter()
        try:
            prepared = solver.solve(gradients, dampings)
        except ValueError as error:
            self.failed[name] = str(error)
            return None
        self.solve_seconds[name] = time.perf_counter() - started
        self.scores[name] = self.score(prepared)
        return prepared


def estimate_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """Scores [q, N] by name: methods, and the points of all sweeps; seconds in the header."""
    [index] = shard.items
    params = context.params
    subject, seed = open_subject(context, index), params.seeds[index]
    sketch, dampings, sketch_seconds = open_sketch(context, index, subject)
    notebook = Notebook(subject)
    gradients = _gradients(notebook)
    fitted = _layerwise(notebook, gradients, dampings, params.estimators.draws, seed)
    exact = ExactGaussNewton(
        subject.curvature, sketch.preconditioner, CG_TOLERANCE[next(iter(gradients.values())).dtype]
    )
    notebook.fit_seconds["exact"] = sketch_seconds
    notebook.solve("exact", exact, gradients, dampings)
    _astra(notebook, context, gradients, dampings, Blockwise(fitted.ekfac), seed)
    _lissa(notebook, context, gradients, dampings, seed)
    _cosine(notebook)
    for name, scores in similarities(subject).items():
        notebook.scores[name] = scores
    for name, scores in sweep(context, subject, gradients, fitted, sketch, dampings, seed).items():
        notebook.scores[name] = notebook.score(scores)
    told = {
        "fit_seconds": notebook.fit_seconds,
        "solve_seconds": notebook.solve_seconds,
        "failed": notebook.failed,
        "notes": notebook.notes,
        "num_parameters": sum(p.numel() for p in subject.model.parameters()),
        "num_attributed": subject.layout.size,
        "num_examples": subject.num_examples,
    }
    store.write_tensors(path, notebook.scores, told)


def _gradients(notebook: Notebook) -> Blocks:
    subject = notebook.subject
    started = time.perf_counter()
    gradients = measurement_gradients(subject.model, subject.layers, subject.queries)
    notebook.notes["gradient_seconds"] = time.perf_counter() - started
    started = time.perf_counter()
    notebook.score(gradients)
    notebook.notes["stream_seconds"] = time.perf_counter() - started
    return gradients


def _layerwise(
    notebook: Notebook,
    gradients: Blocks,
    dampings: Mapping[str, float],
    draws: int,
    seed: int,
) -> Curvature:
    """The estimators that solve each layer for itself."""
    subject = notebook.subject
    batches = subject.batches()
    started = time.perf_counter()
    fitted = fit_curvature(subject.model, subject.layers, batches, seed, draws)
    seconds = time.perf_counter() - started
    notebook.fit_seconds |= {"ekfac": seconds, "kfac": seconds, "gradient_dot": 0.0}
    started = time.perf_counter()
    diagonal = fit_diagonal(subject.model, subject.layers, batches, seed, draws)
    notebook.fit_seconds["diagonal"] = time.perf_counter() - started
    solvers: dict[str, Solver] = {
        "gradient_dot": gradient_dot(subject.layers),
        "diagonal": Blockwise(diagonal),
        "kfac": Blockwise(fitted.kfac()),
        "ekfac": Blockwise(fitted.ekfac),
    }
    for name, solver in solvers.items():
        notebook.solve(name, solver, gradients, dampings)
    return fitted


def _astra(
    notebook: Notebook,
    context: BenchmarkContext,
    gradients: Blocks,
    dampings: Mapping[str, float],
    preconditioner: Solver,
    seed: int,
) -> None:
    given = context.params.estimators
    for iterations in given.astra_iterations:
        name = f"astra/{iterations}"
        solver = ASTRA(
            notebook.subject.curvature, preconditioner, iterations, given.astra_batch, seed
        )
        notebook.solve(name, solver, gradients, dampings)
        notebook.fit_seconds[name] = notebook.fit_seconds["ekfac"]
    _last(notebook, "astra", [f"astra/{n}" for n in given.astra_iterations])


def _lissa(
    notebook: Notebook,
    context: BenchmarkContext,
    gradients: Blocks,
    dampings: Mapping[str, float],
    seed: int,
) -> None:
    """Every depth from one run; the time of a depth is the time until it."""
    given, subject = context.params.estimators, notebook.subject
    names = [f"lissa/{depth}" for depth in given.lissa_depths]
    started = time.perf_counter()
    plan = schedule(subject.curvature, dampings, max(given.lissa_depths), given.lissa_batch, seed)
    fit = time.perf_counter() - started
    notebook.notes["lissa"] = {
        "scale": plan.scale, "batch": plan.batch, "trace": plan.trace, "top": plan.top,
    }  # fmt: skip
    layout = subject.layout
    iterates = LiSSA(subject.curvature, plan, seed).iterates(layout.vector(gradients), dampings)
    started, paused = time.perf_counter(), 0.0
    try:
        for step, answer in enumerate(iterates, start=1):
            if step not in given.lissa_depths:
                continue
            name, now = f"lissa/{step}", time.perf_counter()
            notebook.fit_seconds[name] = fit
            notebook.solve_seconds[name] = now - started - paused
            notebook.scores[name] = notebook.score(layout.blocks(answer))
            paused += time.perf_counter() - now
    except ValueError as error:
        notebook.failed |= {name: str(error) for name in names if name not in notebook.scores}
    _last(notebook, "lissa", names)


def _last(notebook: Notebook, method: str, names: list[str]) -> None:
    """The method as a whole is its longest run."""
    of: list[tuple[dict[str, Any], str]] = [
        (notebook.scores, names[-1]),
        (notebook.fit_seconds, names[-1]),
        (notebook.solve_seconds, names[-1]),
        (notebook.failed, names[-1]),
    ]
    for table, name in of:
        if name in table:
            value = table[name]
            table[method] = value.clone() if isinstance(value, Tensor) else value


def _cosine(notebook: Notebook) -> None:
    """Gradient dot product over the norms of both gradients."""
    subject = notebook.subject
    started = time.perf_counter()
    norms: Callable[..., Tensor] = squared_norms
    examples = norms(subject.model, subject.layers, subject.train, training_loss)
    queries = norms(subject.model, subject.layers, subject.queries, log_probability)
    scale = (queries[:, None] * examples).sqrt().double()
    tiny = torch.finfo(scale.dtype).tiny
    notebook.scores["cosine"] = notebook.scores["gradient_dot"] / scale.clamp(min=tiny)
    notebook.fit_seconds["cosine"] = time.perf_counter() - started
    notebook.solve_seconds["cosine"] = 0.0
