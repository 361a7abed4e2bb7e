"""The files of all phases side by side: what each method said, and what is true."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.statistics import Agreement, bootstrap_interval
from tasks import store
from tasks.validation.context import BenchmarkContext
from tasks.validation.settings import METHODS
from tasks.validation.subject import open_subject

BOOTSTRAP = 0  # seed of all resampling
SCATTERED = ("exact", "ekfac", "lissa", "gradient_dot")
SCHEMA = {"seed": "int64", "query": "int64", "example": "int64", "pbrf": "float64"}


@dataclass(frozen=True)
class Phases:
    """The files of all phases, by seed or by part."""

    models: tuple[Path, ...]
    truths: tuple[Path, ...]
    estimates: tuple[Path, ...]
    retrained: tuple[Path, ...]
    mislabelled: tuple[Path, ...]
    tuned: tuple[Path, ...]

    @cached_property
    def responses(self) -> list[dict[str, Tensor]]:
        """What the truth's parts hold, joined, for each seed."""
        size = len(self.truths) // len(self.models)
        joined = []
        for start in range(0, len(self.truths), size):
            parts = [store.read_tensors(path) for path in self.truths[start : start + size]]
            joined.append(
                {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
            )
        return joined

    @cached_property
    def scores(self) -> list[dict[str, Float[Tensor, "q n"]]]:
        """Scores of all training examples by name, for each seed."""
        return [store.read_tensors(path) for path in self.estimates]

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        """Seconds, failures and sizes of the estimates of each seed."""
        return [store.read_metadata(path) for path in self.estimates]


@dataclass(frozen=True, slots=True)
class Compared:
    """Rows of queries over all seeds, the examples with a ground truth in the columns."""

    phases: Phases
    places: Sequence[Tensor]
    epsilon: float

    @property
    def truth(self) -> Float[Tensor, "q z"]:
        """The responses at the ε that is compared with."""
        return torch.cat([each[f"response/{self.epsilon}"] for each in self.phases.responses])

    def scores(self, name: str) -> Float[Tensor, "q z"] | None:
        """A method's scores of the same; None if it failed in some seed."""
        rows = []
        for scores, places in zip(self.phases.scores, self.places, strict=True):
            if name not in scores:
                return None
            rows.append(scores[name][:, places])
        return torch.cat(rows)

    def with_truth(self, name: str) -> Agreement | None:
        """A method's agreement with the truth."""
        scores = self.scores(name)
        return None if scores is None else correlation(scores, self.truth)

    def between(self, name: str, other: str) -> Agreement | None:
        """The agreement of two methods."""
        one, two = self.scores(name), self.scores(other)
        return None if one is None or two is None else correlation(one, two)


def correlation(x: Float[Tensor, "q n"], y: Float[Tensor, "q n"]) -> Agreement:
    """Mean over rows, with its bootstrap interval."""
    return Agreement.of(x, y, BOOTSTRAP)


def of_values(values: Float[Tensor, " q"]) -> Agreement:
    """Rank correlations that were computed one by one: their mean with its interval."""
    middle = float(values.mean())
    return Agreement(middle, middle, *bootstrap_interval(values, BOOTSTRAP), len(values))


def scatter_of(phases: Phases, compared: Compared) -> tuple[dict[str, Any], Any]:
    """Estimates by method and the truth of all queries, as arrays for the figure."""
    found = {name: compared.scores(name) for name in SCATTERED}
    shown = {name: scores.numpy() for name, scores in found.items() if scores is not None}
    return shown, compared.truth.numpy()


def compared_of(context: BenchmarkContext, phases: Phases) -> Compared:
    """The comparison at the first ε of the params."""
    places = [open_subject(context, index).places for index in range(len(phases.models))]
    return Compared(phases, places, context.params.truth.epsilons[0])


def write_scores(context: BenchmarkContext, phases: Phases, path: Path) -> None:
    """One row for each seed, query and example with a ground truth: PBRF and every method."""
    names = [name for name in METHODS if all(name in scores for scores in phases.scores)]
    columns: dict[str, list[Any]] = {name: [] for name in (*SCHEMA, *names)}
    epsilon = context.params.truth.epsilons[0]
    for index, seed in enumerate(context.params.seeds):
        subject = open_subject(context, index)
        truth = phases.responses[index][f"response/{epsilon}"]
        num_queries, num_places = truth.shape
        columns["seed"] += [seed] * truth.numel()
        columns["query"] += subject.queries.ids.repeat_interleave(num_places).tolist()
        columns["example"] += subject.train.ids[subject.places].repeat(num_queries).tolist()
        columns["pbrf"] += truth.flatten().tolist()
        for name in names:
            columns[name] += phases.scores[index][name][:, subject.places].flatten().tolist()
    store.write_table(path, columns, SCHEMA | dict.fromkeys(names, "float64"))
