"""An outcome as a benchmark might find it, with something of everything, failures included."""

from dataclasses import replace
from typing import Any

import numpy as np

from influence.statistics import Agreement
from tasks.validation.outcome import (
    Found,
    MethodOutcome,
    Outcome,
    Point,
    Retrained,
    Trained,
    TruthOutcome,
)

SEEDS = (0, 1, 2)
# Pearson with the PBRF, seconds to fit, seconds a query.
FOUND = {
    "gradient_dot": (0.58, 0.0, 0.0004),
    "cosine": (0.49, 0.0, 0.0005),
    "diagonal": (0.71, 0.35, 0.0006),
    "kfac": (0.86, 1.9, 0.0019),
    "ekfac": (0.91, 2.6, 0.002),
    "lissa": (0.94, 0.9, 8.1),
    "astra": (0.983, 2.6, 0.71),
    "exact": (0.999, 2.6, 1.9),
}
DIVERGED = (
    "diverged at iteration 37: the largest eigenvalue is 412, the step 0.01 | try a smaller one"
)


def correlation(pearson: float, width: float = 0.06) -> Agreement:
    spread = width * (1 - pearson)
    low, high = pearson - 1.2 * spread - 0.004, min(1.0, pearson + spread)
    return Agreement(pearson, pearson - 0.02, low, high, 30)


def method(name: str, pearson: float, fit: float, query: float) -> MethodOutcome:
    dot = FOUND["gradient_dot"][0]
    return MethodOutcome(
        truth=correlation(pearson),
        exact=correlation(min(1.0, pearson + 0.001)),
        by_seed=(pearson - 0.02, pearson, pearson + 0.02 * (1 - pearson)),
        above_dot=None
        if name == "gradient_dot"
        else (pearson - dot, pearson - dot - 0.03, pearson - dot + 0.03),
        fit_seconds=fit,
        query_seconds=query,
    )


def failure(reason: str = DIVERGED) -> MethodOutcome:
    return MethodOutcome(None, None, (None, None, None), None, 0.4, 0.0, reason)


def truth(epsilon: float, pearson: float, linearity: float) -> TruthOutcome:
    exact = correlation(pearson, 0.5)
    return TruthOutcome(epsilon, exact, 1.0, 8.7e-9, 212.4, 321.0, linearity)


def points(name: str, rows: dict[float, float | None], seconds: float = 0.01) -> tuple[Point, ...]:
    return tuple(
        Point(
            x,
            name,
            None if y is None else correlation(y - 0.01),
            None if y is None else correlation(y),
            seconds * x,
            "" if y is not None else DIVERGED,
        )
        for x, y in rows.items()
    )


def outcome(benchmark: str = "concrete", **changes: Any) -> Outcome:
    """`benchmark`, with `changes` of its fields."""
    lissa = points("lissa", {10: 0.60, 40: 0.72, 160: 0.85, 640: 0.94}, 0.0127)
    astra = points("astra", {10: 0.95, 50: 0.975, 200: 0.99}, 0.0036)
    memory = {1: "0.53 MB", 2: "0.27 MB", 4: "0.13 MB", 8: "0.07 MB", 16: "0.03 MB"}
    splits = points("ekfac", {1: 1.0, 2: 0.98, 4: 0.95, 8: 0.91, 16: 0.86})
    methods = {name: method(name, *numbers) for name, numbers in FOUND.items()}
    whole = Outcome(
        benchmark=benchmark,
        title="Concrete strength: 2 × 128 tanh",
        seeds=SEEDS,
        num_examples=721,
        num_truth=500,
        num_queries=10,
        num_parameters=17_793,
        num_attributed=17_793,
        dtype="float64",
        damping={"ratio": 0.1},
        trained=tuple(
            Trained(seed, 0.03, 1e-4, 0.041, 0.066, 0.071, 5.2) for seed in SEEDS
        ),
        truth=(truth(0.1, 0.9994, 0.004), truth(0.05, 0.9996, 0.0), truth(1.0, 0.984, 0.09)),
        methods={**methods, "bm25": failure("needs text")},
        lissa=lissa,
        astra=astra,
        dampings=points("ekfac", {0.01: 0.80, 0.03: 0.86, 0.1: 0.91, 0.3: 0.95, 1.0: 0.98})
        + points("kfac", {0.01: 0.66, 0.03: 0.77, 0.1: 0.86, 0.3: 0.92, 1.0: 0.97})
        + points("gradient_dot", {0.01: 0.40, 0.03: 0.48, 0.1: 0.58, 0.3: 0.66, 1.0: 0.80}),
        ranks=points("ekfac", {1: 0.70, 4: 0.90, 16: 0.985, 32: 0.997, 64: 0.9999}),
        splits=tuple(replace(p, note=memory[int(p.x)]) for p in splits),
        fit_sizes=points("ekfac", {16: 0.75, 64: 0.87, 256: 0.96, 721: 1.0}),
        retrained=Retrained(
            {"ekfac": correlation(0.44), "gradient_dot": correlation(0.18),
             "astra": correlation(0.47)},
            correlation(0.78), 64, 8, 512.0,
        ),
        mislabelled=Found(
            124, {"ekfac": {"0.1": 0.71, "0.2": 0.93}, "gradient_dot": {"0.1": 0.6, "0.2": 0.88}}
        ),
        fine_tuned=None,
        seconds=611.0,
        machine={"cpu": "x86_64", "threads": 1},
    )  # fmt: skip
    return replace(whole, **changes)


def arrays() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Estimates by method [queries, examples], and the PBRF."""
    random = np.random.default_rng(0)
    truth = random.standard_t(3, (10, 500)) * random.gamma(1, 1, (10, 1)) * 1e-3
    noise = truth.std(axis=1, keepdims=True)
    noisy = {"exact": 0.02, "ekfac": 0.5, "gradient_dot": 1.6, "lissa": 0.35}
    return {
        name: (200 if name == "gradient_dot" else 0.95)
        * (truth + share * noise * random.standard_normal(truth.shape))
        for name, share in noisy.items()
    }, truth
