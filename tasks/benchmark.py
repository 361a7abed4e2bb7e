"""Stage `validate` of a benchmark: how well each estimator agrees with the true response."""

import time
from itertools import pairwise
from pathlib import Path

from tasks import store
from tasks.shards import Compute, ShardRef, map_shards, shards_of
from tasks.validation import pictures
from tasks.validation.comparing import Phases, compared_of, scatter_of, write_scores
from tasks.validation.context import FIGURES, RESULT, SCORES, BenchmarkContext
from tasks.validation.estimates import estimate_shard
from tasks.validation.gathering import gather
from tasks.validation.journal import record_benchmark
from tasks.validation.retraining import mislabelled_shard, subset_shard, tuning_shard
from tasks.validation.subject import open_subject
from tasks.validation.truth import model_shard, sketch_shard, truth_shard

PARTS = 10  # of the responses of one seed: what is lost at most when the stage is killed


def run(context: BenchmarkContext) -> None:
    """Write the tables and figures of `validation/dvc.yaml`, and `result.json`."""
    started, clock = time.time(), time.perf_counter()
    phases = compute(context)
    outcome, by_seed = gather(context, phases, time.perf_counter() - clock)
    store.write_json(context.out / RESULT, outcome.as_json())
    write_scores(context, phases, context.out / SCORES)
    figures = [context.out / name for name in FIGURES]
    pictures.correlation(outcome, figures[0])
    pictures.against_time(outcome, figures[1])
    pictures.scatter(*scatter_of(phases, compared_of(context, phases)), figures[2])
    pictures.sweeps(outcome, figures[3])
    files = [context.out / RESULT, context.out / SCORES, *figures]
    record_benchmark(context, started, outcome, files, by_seed)


def compute(context: BenchmarkContext) -> Phases:
    """All that takes time, shard by shard; what is there already is not computed again."""
    params = context.params
    num_seeds = len(params.seeds)
    seeds = shards_of([seed] for seed in range(num_seeds))

    def each(
        compute: Compute, name: str, shards: list[ShardRef] = seeds, items: str = "seeds"
    ) -> tuple[Path, ...]:
        return tuple(map_shards(context, compute, shards, name=name, items=items))

    models = each(model_shard, "model")
    each(sketch_shard, "sketch")
    num_truth = num_places(context)
    parts = shards_of(
        range(seed * num_truth + low, seed * num_truth + high)
        for seed in range(num_seeds)
        for low, high in bounds(num_truth, PARTS)
    )
    truths = map_shards(
        context, truth_shard, parts, name="truth", items="examples", num_truth=num_truth
    )
    estimates = each(estimate_shard, "estimates")
    again, wrong, tuned = params.retraining, params.mislabelled, params.fine_tuning
    subsets = (
        shards_of(range(low, high) for low, high in bounds(again.subsets, PARTS)) if again else []
    )
    return Phases(
        models,
        tuple(truths),
        estimates,
        each(subset_shard, "retrained", subsets, "subsets") if again else (),
        each(mislabelled_shard, "mislabelled") if wrong else (),
        each(tuning_shard, "tuned", shards_of([range(tuned.examples)]), "examples")
        if tuned
        else (),
    )


def num_places(context: BenchmarkContext) -> int:
    """Training examples with a ground truth: as many as are asked for, or all there are."""
    return len(open_subject(context, 0).places)


def bounds(total: int, parts: int) -> list[tuple[int, int]]:
    """`range(total)` cut into at most so many parts, none empty."""
    parts = min(total, parts)
    cuts = [total * part // parts for part in range(parts + 1)]
    return list(pairwise(cuts))
