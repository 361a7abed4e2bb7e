"""From the files of all phases to the numbers of a benchmark."""

import os
import platform
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.statistics import bootstrap_interval, pearson, spearman
from tasks import store
from tasks.validation import labels
from tasks.validation.comparing import (
    BOOTSTRAP,
    Compared,
    Phases,
    compared_of,
    correlation,
)
from tasks.validation.context import BenchmarkContext
from tasks.validation.further import fine_tuned, mislabelled, retrained
from tasks.validation.outcome import (
    MethodOutcome,
    Outcome,
    Point,
    Trained,
    TruthOutcome,
)
from tasks.validation.settings import METHODS
from tasks.validation.subject import open_subject
from tasks.validation.sweeps import memory_share, points_of

ELDER = 0.1  # of a query's largest response: below, a ratio of two responses says nothing


def gather(
    context: BenchmarkContext, phases: Phases, seconds: float
) -> tuple[Outcome, dict[str, list[dict[str, float]]]]:
    """The outcome, and further numbers of each method and seed for MLflow."""
    params = context.params
    subject, compared = open_subject(context, 0), compared_of(context, phases)
    note = phases.notes[0]
    outcome = Outcome(
        benchmark=context.run,
        title=params.title,
        seeds=params.seeds,
        num_examples=note["num_examples"],
        num_truth=len(compared.places[0]),
        num_queries=len(subject.queries.ids),
        num_parameters=note["num_parameters"],
        num_attributed=note["num_attributed"],
        dtype=params.dtype,
        damping=params.damping.model_dump(),
        trained=_trained(params.seeds, phases),
        truth=_truths(params.truth.epsilons, compared, phases),
        methods={
            name: _method(name, compared, phases)
            for name in METHODS
            if any(name in scores for scores in phases.scores)
            or any(name in notes["failed"] for notes in phases.notes)
        },
        lissa=_runs("lissa", params.estimators.lissa_depths, compared, phases),
        astra=_runs("astra", params.estimators.astra_iterations, compared, phases),
        dampings=_sweep("damping", compared),
        ranks=_sweep("rank", compared),
        splits=_sweep(
            "split",
            compared,
            lambda x: labels.percent(memory_share(subject, int(x))),
        ),
        fit_sizes=_sweep("fit", compared),
        retrained=retrained(params.retraining, phases),
        mislabelled=mislabelled(phases),
        fine_tuned=fine_tuned(compared, phases),
        seconds=seconds,
        machine=_machine(),
    )
    return outcome, _by_seed(outcome, compared, phases)


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
    }


def _trained(seeds: Sequence[int], phases: Phases) -> tuple[Trained, ...]:
    found = []
    for seed, path in zip(seeds, phases.models, strict=True):
        told = store.read_metadata(path)
        chosen = told["chosen"]
        found.append(
            Trained(
                seed=seed,
                learning_rate=chosen["learning_rate"],
                weight_decay=chosen["weight_decay"],
                train_loss=chosen["train_loss"],
                validation_loss=chosen["validation_loss"],
                test_loss=told["test_loss"],
                seconds=told["seconds"],
            )
        )
    return tuple(found)


def _truths(
    epsilons: Sequence[float], compared: Compared, phases: Phases
) -> tuple[TruthOutcome, ...]:
    exact = compared.scores("exact")
    assert exact is not None, "the exact solve failed; nothing can be held against it"
    smallest = _responses(phases, min(epsilons))
    found = []
    for epsilon in epsilons:
        response = _responses(phases, epsilon)
        solved = response.isfinite().all(dim=0)
        residual = torch.cat([each[f"residual/{epsilon}"] for each in phases.responses])
        known = residual.isfinite()
        evaluations = torch.cat([each[f"evaluations/{epsilon}"] for each in phases.responses])
        both = solved & smallest.isfinite().all(dim=0)
        large = smallest[:, both].abs() > ELDER * smallest[:, both].abs().amax(1, keepdim=True)
        ratio = (response[:, both] / smallest[:, both])[large]
        told = [store.read_metadata(path)["seconds"][str(epsilon)] for path in phases.truths]
        found.append(
            TruthOutcome(
                epsilon=epsilon,
                exact=correlation(exact[:, solved], response[:, solved]),
                converged=float((residual[known] <= _tolerance(phases)).double().mean()),
                worst_residual=float(residual[known].max()),
                evaluations=float(evaluations[known].mean()),
                seconds=sum(told) / len(phases.models),
                linearity=float((ratio - 1).abs().median()),
            )
        )
    return tuple(found)


def _tolerance(phases: Phases) -> float:
    return store.read_metadata(phases.truths[0])["tolerance"]


def _responses(phases: Phases, epsilon: float) -> Float[Tensor, "q z"]:
    """Of all seeds; the columns are places, which seeds count alike."""
    return torch.cat([each[f"response/{epsilon}"] for each in phases.responses])


def _method(name: str, compared: Compared, phases: Phases) -> MethodOutcome:
    by_seed: list[float | None] = []
    for scores, response, places in zip(
        phases.scores, phases.responses, compared.places, strict=True
    ):
        truth = response[f"response/{compared.epsilon}"]
        rows = zip(scores[name][:, places], truth, strict=True) if name in scores else ()
        each = [pearson(row, wanted) for row, wanted in rows]
        by_seed.append(mean(each) if each else None)
    failed = next((n["failed"][name] for n in phases.notes if name in n["failed"]), None)
    queries = len(phases.scores[0]["gradient_dot"])
    solve = [note["solve_seconds"].get(name, 0.0) for note in phases.notes]
    gradient = 0.0 if name in ("bm25", "tfidf", "hidden_cosine") else _gradient_seconds(phases)
    return MethodOutcome(
        truth=compared.with_truth(name),
        exact=compared.between(name, "exact"),
        by_seed=tuple(by_seed),
        above_dot=None if name == "gradient_dot" else _above_dot(name, compared),
        fit_seconds=mean(note["fit_seconds"].get(name, 0.0) for note in phases.notes),
        query_seconds=(mean(solve) + gradient) / queries,
        failed=failed,
    )


def _gradient_seconds(phases: Phases) -> float:
    """Of ∇f of all queries: every method that uses gradients pays for them."""
    return mean(note["notes"]["gradient_seconds"] for note in phases.notes)


def _above_dot(name: str, compared: Compared) -> tuple[float, float, float] | None:
    """Mean difference of Pearson to gradient dot product by query, with its interval."""
    scores, dot = compared.scores(name), compared.scores("gradient_dot")
    if scores is None or dot is None:
        return None
    difference = torch.tensor(
        [pearson(s, t) - pearson(d, t) for s, d, t in zip(scores, dot, compared.truth, strict=True)]
    )
    return float(difference.mean()), *bootstrap_interval(difference, BOOTSTRAP)


def _runs(
    method: str, lengths: Sequence[int], compared: Compared, phases: Phases
) -> tuple[Point, ...]:
    """The same method run shorter and longer."""
    points = []
    queries = len(phases.scores[0]["gradient_dot"])
    for length in lengths:
        name = f"{method}/{length}"
        told = next((n["failed"][name] for n in phases.notes if name in n["failed"]), "")
        if method == "lissa" and not told:
            scale = mean(note["notes"]["lissa"]["scale"] for note in phases.notes)
            told = f"extra damping {1 / (scale * length):.2g}"
        seconds = [note["solve_seconds"].get(name, 0.0) for note in phases.notes]
        points.append(
            Point(
                x=length,
                method=method,
                truth=compared.with_truth(name),
                reference=compared.between(name, "exact"),
                seconds=(mean(seconds) + _gradient_seconds(phases)) / queries,
                note=told,
            )
        )
    return tuple(points)


def _sweep(which: str, compared: Compared, note: Any = lambda x: "") -> tuple[Point, ...]:
    points = []
    for name, method, x in points_of(compared.phases.scores[0], which):
        if which == "damping":
            reference = f"sweep/damping/exact/{x:g}" if method != "exact" else None
        elif which == "split":
            reference = "sweep/split/ekfac/1"
        else:  # full rank, all examples
            reference = "ekfac"
        agreed = compared.between(name, reference) if reference else None
        points.append(Point(x, method, compared.with_truth(name), agreed, 0.0, note(x)))
    return tuple(points)


def _by_seed(
    outcome: Outcome, compared: Compared, phases: Phases
) -> dict[str, list[dict[str, float]]]:
    """Further numbers of each method, a seed each."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in outcome.methods:
        for index, places in enumerate(compared.places):
            scores, note = phases.scores[index], phases.notes[index]
            numbers = {
                "seconds/fit": note["fit_seconds"].get(name, 0.0),
                "seconds/solve": note["solve_seconds"].get(name, 0.0),
            }
            if name in scores:
                truth = phases.responses[index][f"response/{compared.epsilon}"]
                mine = scores[name][:, places]
                exact = scores["exact"][:, places]
                rows = list(zip(mine, truth, strict=True))
                numbers["spearman"] = mean(spearman(a, b) for a, b in rows)
                numbers["pearson_exact"] = mean(
                    pearson(a, b) for a, b in zip(mine, exact, strict=True)
                )
            found.setdefault(name, []).append(numbers)
    return found
