"""What a benchmark found: the shape of metrics.json, from which tables and figures are made."""

from dataclasses import asdict, dataclass, field
from typing import Any

from influence.statistics import Agreement


@dataclass(frozen=True, slots=True)
class MethodOutcome:
    """One estimator or baseline, all seeds together.

    Attributes:
        truth: agreement with the PBRF; None if it failed.
        exact: agreement with the exact Gauss-Newton influence; None if it failed.
        by_seed: mean Pearson with the PBRF of each seed, in the order of `seeds`.
        above_dot: mean difference of Pearson to gradient dot product, query by query, with its
            paired bootstrap interval: (mean, low, high); None for that method itself.
        fit_seconds: once per model, mean over seeds.
        query_seconds: for one query more, mean over seeds.
        failed: why it has no number, in a sentence; None if it has.
    """

    truth: Agreement | None
    exact: Agreement | None
    by_seed: tuple[float | None, ...]
    above_dot: tuple[float, float, float] | None
    fit_seconds: float
    query_seconds: float
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class TruthOutcome:
    """The PBRF at one weight ε of z (in copies, times 1/N), all seeds together.

    Attributes:
        epsilon: in copies.
        exact: agreement of the exact Gauss-Newton influence with it.
        converged: share of the solves that reached the tolerance.
        worst_residual: the largest relative residual at the end.
        evaluations: mean gradients of the objective a solve took.
        seconds: all solves of a seed, mean over seeds.
        linearity: median over queries and examples of |response per copy ÷ that at the smallest ε
            − 1|, over the pairs above a tenth of the query's largest; 0 for the smallest.
    """

    epsilon: float
    exact: Agreement
    converged: float
    worst_residual: float
    evaluations: float
    seconds: float
    linearity: float


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep: `x` is a depth, a ratio, a rank, a number of blocks or of examples.

    Attributes:
        x: what is swept.
        method: by its name in METHODS.
        truth: agreement with the PBRF (at the benchmark's own damping).
        reference: agreement with the sweep's reference: the exact influence at the same damping,
            full rank, one block, all examples, …; None where it is the same as `truth`.
        seconds: of one query's solve at this point, fitting left out.
        note: what else the point says, such as memory or extra damping.
    """

    x: float
    method: str
    truth: Agreement | None
    reference: Agreement | None
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Retrained:
    """Linear datamodeling score of each method, and what retraining noise leaves of 1.

    `ceiling` is the mean rank correlation of f between two halves of the trainings of each subset,
    raised to all of them by Spearman and Brown; no method can be expected above it.
    """

    scores: dict[str, Agreement]
    ceiling: Agreement
    num_subsets: int
    num_seeds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """Mislabelled examples found by self-influence.

    `found[share]` is the share of the mislabelled among the top `share` by each method.
    """

    num_mislabelled: int
    found: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Trained:
    """One seed's model: what the validation loss chose, and the losses (nats, or half squares)."""

    seed: int
    learning_rate: float
    weight_decay: float
    train_loss: float
    validation_loss: float
    test_loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a benchmark found."""

    benchmark: str
    title: str
    seeds: tuple[int, ...]
    num_examples: int
    num_truth: int
    num_queries: int
    num_parameters: int
    num_attributed: int
    dtype: str
    damping: dict[str, float]
    trained: tuple[Trained, ...]
    truth: tuple[TruthOutcome, ...]
    methods: dict[str, MethodOutcome]
    lissa: tuple[Point, ...]
    astra: tuple[Point, ...]
    dampings: tuple[Point, ...]
    ranks: tuple[Point, ...]
    splits: tuple[Point, ...]
    fit_sizes: tuple[Point, ...]
    retrained: Retrained | None
    mislabelled: Found | None
    fine_tuned: dict[str, Agreement] | None
    seconds: float
    machine: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
