"""The ground truth of a benchmark: models, sketches of G, and proximal Bregman responses."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from influence.validation.estimators import fit_curvature
from influence.validation.nystrom import Nystrom, Woodbury
from influence.validation.pbrf import ProximalObjective, respond
from tasks import store
from tasks.precision import DTYPES
from tasks.shards import ShardRef
from tasks.validation.context import BenchmarkContext
from tasks.validation.networks import build
from tasks.validation.subject import (
    Subject,
    damping_of_seed,
    open_splits,
    open_subject,
    sketch_file,
)
from tasks.validation.training import train


def model_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """Train one seed's model on the grid."""
    [index] = shard.items
    params = context.params
    seed, dtype = params.seeds[index], DTYPES[params.dtype]
    splits = open_splits(context, seed)
    model, trained = train(
        lambda weights: build(params.network, splits, dtype, weights),
        splits,
        params.training,
        seed,
    )
    # Tied weights are stored once by safetensors, and read twice.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    store.write_tensors(path, state, asdict(trained))


def sketch_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """The dampings λ_ℓ that everything shares, and the sketch of G for the exact solves."""
    [index] = shard.items
    subject = open_subject(context, index)
    params = context.params
    fitted = fit_curvature(
        subject.model,
        subject.layers,
        subject.batches(),
        params.seeds[index],
        draws=params.estimators.draws,
    )
    started = time.perf_counter()
    sketch = Nystrom.of(subject.curvature, params.truth.sketch, params.seeds[index])
    dampings = fitted.dampings(damping_of_seed(context, index, subject.train))
    inverse = sketch.inverse(dampings)  # once, for the many shards that solve with it
    store.write_tensors(
        path,
        {"F": sketch.F, "K": inverse.K},
        {"dampings": dampings, "seconds": time.perf_counter() - started},
    )


def open_inverse(
    context: BenchmarkContext, index: int, subject: Subject
) -> tuple[Woodbury, dict[str, float]]:
    """The sketch's damped inverse, and the dampings."""
    file = sketch_file(context, index)
    dampings = store.read_metadata(file)["dampings"]
    by_layer = subject.layout.by_layer(dampings, subject.layout.current())
    return Woodbury(store.read_tensor(file, "K"), by_layer), dampings


def open_sketch(
    context: BenchmarkContext, index: int, subject: Subject
) -> tuple[Nystrom, dict[str, float], float]:
    """The sketch, the dampings and what the sketch took in seconds."""
    file = sketch_file(context, index)
    told = store.read_metadata(file)
    sketch = Nystrom(subject.layout, store.read_tensor(file, "F"))
    return sketch, told["dampings"], told["seconds"]


def truth_shard(context: BenchmarkContext, shard: ShardRef, path: Path, num_truth: int) -> None:
    """Responses of the examples of one seed: items are seed · num_truth + place of the example.

    Writes, for every ε: `response/<ε>` [q, z], f(θ(+ε)) − f(θ(−ε)) over 2εN, the change for one
    copy; NaN where the ε is only checked on the first examples; `residual/<ε>` and
    `evaluations/<ε>` [z], the worse and the sum of both signs.
    """
    index = shard.items[0] // num_truth
    subject, truth = open_subject(context, index), context.params.truth
    inverse, dampings = open_inverse(context, index, subject)
    objective = ProximalObjective(
        subject.model, subject.layout, subject.train, dampings, subject.examples_at_once
    )
    found: dict[str, list[Tensor]] = {}
    seconds = dict.fromkeys(map(str, truth.epsilons), 0.0)
    places = [item % num_truth for item in shard.items]
    size = subject.side_by_side
    for start in range(0, len(places), size):
        some = places[start : start + size]
        for number, epsilon in enumerate(truth.epsilons):
            solved = some if number == 0 else [place for place in some if place < truth.checked]
            started = time.perf_counter()
            parts = _responses(subject, objective, inverse.apply, solved, epsilon, context)
            seconds[str(epsilon)] += time.perf_counter() - started
            for name, part in parts.items():
                missing = part.new_full((*part.shape[:-1], len(some) - len(solved)), torch.nan)
                found.setdefault(f"{name}/{epsilon}", []).append(torch.cat([part, missing], dim=-1))
        shard.tick(len(some))
    tensors = {name: torch.cat(parts, dim=-1) for name, parts in found.items()}
    store.write_tensors(path, tensors, {"seconds": seconds, "tolerance": truth.tolerance})


def _responses(
    subject: Subject,
    objective: ProximalObjective,
    precondition: Callable[[Tensor], Tensor],
    solved: list[int],
    epsilon: float,
    context: BenchmarkContext,
) -> dict[str, Float[Tensor, "... z"]]:
    """Both signs of ε for some examples."""
    truth, num_queries = context.params.truth, len(subject.queries.ids)
    if not solved:
        empty = subject.layout.current().new_zeros(num_queries, 0).double()
        return {"response": empty, "residual": empty[0], "evaluations": empty[0]}
    extra = subject.train.select(subject.places[solved])
    sides = [
        respond(
            objective,
            precondition,
            extra,
            sign * epsilon / subject.num_examples,
            truth.tolerance,
            truth.max_evaluations,
        )
        for sign in (1, -1)
    ]
    # Sums in float64: near θˢ the two f agree in most digits.
    up, down = (subject.measure(side.offsets).double() for side in sides)
    worst = torch.maximum(sides[0].residuals, sides[1].residuals).double()
    evaluations = (sides[0].evaluations + sides[1].evaluations).double()
    return {
        # per copy: a copy more is ε = 1/N, and 2ε/N were moved
        "response": (up - down) / (2 * epsilon),
        "residual": worst,
        "evaluations": evaluations,
    }
