"""What MLflow is told of a benchmark: a run for its execution, below it one a method and seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks import lineage
from tasks.logbook import flat, source_tags
from tasks.tracking import BENCHMARKS, NOTE, Child, Entry, record
from tasks.validation import labels
from tasks.validation.context import BenchmarkContext
from tasks.validation.outcome import MethodOutcome, Outcome, Point
from tasks.validation.settings import benchmark_file
from tasks.workspace import ARTIFACTS

# MLflow draws metrics that share what is before the slash in one section.
SWEEPS = {  # series of the parent, with the swept value as step
    "lissa": "lissa_by_depth",
    "astra": "astra_by_iterations",
    "dampings": "by_damping",
    "ranks": "by_rank",
    "splits": "by_blocks",
    "fit_sizes": "by_fit_examples",
}
PER_DAMPING = 1e6  # steps are integers: that of a damping is in millionths of the mean
BySeed = Mapping[str, Sequence[Mapping[str, float]]]


def record_benchmark(
    context: BenchmarkContext,
    started: float,
    outcome: Outcome,
    files: Sequence[Path],
    by_seed: BySeed | None = None,
) -> str | None:
    """Log a finished benchmark; the id of the parent run, None if the store could not take it.

    Args:
        context: of the stage.
        started: when, in seconds since the epoch.
        outcome: what came out.
        files: the artifacts: figures (.png) and tables. The first is the JSON of the outcome;
            its sha256 is the tag by which docs/results/<name>.json leads to the MLflow run.
        by_seed: of each method, further numbers of each seed, in the order of `outcome.seeds`:
            spearman, pearson_exact, seconds/fit, seconds/query.
    """
    told = lineage.benchmark_tags(context, benchmark_file(context.run))
    entry = benchmark_entry(context, started, outcome, files, by_seed or {}, told)
    return record(context.root, entry)


def benchmark_entry(
    context: BenchmarkContext,
    started: float,
    outcome: Outcome,
    files: Sequence[Path],
    by_seed: BySeed,
    origin: Mapping[str, str],
) -> Entry:
    """The entry of a finished benchmark with its children.

    Arguments are those of `record_benchmark`, and where the execution comes from, as tags.
    """
    run, stage = context.run, context.stage
    told = {**origin, "benchmark": run}
    experiment = told.get("dvc.exp")
    figures = [file for file in files if file.suffix == ".png"]
    return Entry(
        name=run + (f" ({experiment})" if experiment else ""),
        started=started,
        metrics_file=files[0],
        tags={**told, NOTE: note(outcome, told), **source_tags(context, told)},
        params=flat(context.params.model_dump(mode="json", by_alias=True)),
        metrics=metrics_by_section(outcome),
        series=sweep_series(outcome),
        artifacts={
            "figures": figures,
            "tables": [file for file in files if file not in figures],
        },
        children=children(outcome, by_seed),
        experiment=BENCHMARKS,
        again=f"dvc repro --force --single-item validation/dvc.yaml:{stage}@{run}",
    )


def note(outcome: Outcome, tags: Mapping[str, str]) -> str:
    """The run's description: the result in a line, and where everything is. Markdown."""
    lines = [f"{outcome.title}."]
    for name, each in outcome.methods.items():
        if each.failed is not None:
            lines.append(f"{labels.method(name)} failed: {each.failed}.")
        elif name in ("ekfac", "gradient_dot") and each.truth:
            found = each.truth
            lines.append(
                f"{labels.method(name)} agrees with the PBRF with r = {found.pearson:.3f} "
                f"({found.low:.3f} to {found.high:.3f}, {found.num_queries} queries)."
            )
    name = outcome.benchmark
    where = [f"Files: `{ARTIFACTS / name}`; numbers: `docs/results/{name}.json`."]
    if experiment := tags.get("dvc.exp"):
        where.append(f"Experiment: `dvc exp apply {experiment}`.")
    if url := tags.get("prefect.url"):
        where.append(f"[Flow run in Prefect]({url}).")
    return " ".join(lines) + "\n\n" + " ".join(where)


def metrics_by_section(outcome: Outcome) -> dict[str, object]:
    """`pearson/ekfac`, `truth/exact_0.1`, `lds/ceiling`, `rank/32`, `mislabelled/ekfac_0.2`, …"""
    named: dict[str, object] = {}
    for name, each in outcome.methods.items():
        if each.truth:
            named[f"pearson/{name}"] = each.truth.pearson
            named[f"pearson_low/{name}"] = each.truth.low
            named[f"pearson_high/{name}"] = each.truth.high
        if each.above_dot:
            named[f"above_dot/{name}"] = each.above_dot[0]
            named[f"above_dot_low/{name}"] = each.above_dot[1]
    for each in outcome.truth:
        named[f"truth/exact_{each.epsilon:g}"] = each.exact.pearson
        named[f"truth/linearity_{each.epsilon:g}"] = each.linearity
        named[f"truth/converged_{each.epsilon:g}"] = each.converged
        named[f"truth/worst_residual_{each.epsilon:g}"] = each.worst_residual
    for point in outcome.ranks:
        if point.reference and point.method == "ekfac":
            named[f"rank/{point.x:g}"] = point.reference.pearson
    if outcome.retrained:
        scores = {**outcome.retrained.scores, "ceiling": outcome.retrained.ceiling}
        named |= {f"lds/{name}": found.pearson for name, found in scores.items()}
    if outcome.mislabelled:
        shares = flat(outcome.mislabelled.found)  # ekfac.0.2
        named |= {f"mislabelled/{key.replace('.', '_', 1)}": part for key, part in shares.items()}
    named |= {
        f"fine_tuned/{name}": each.pearson for name, each in (outcome.fine_tuned or {}).items()
    }
    return {**named, "seconds/all": outcome.seconds}


def sweep_series(outcome: Outcome) -> dict[str, dict[int, float]]:
    """`by_rank/ekfac` and `by_rank/ekfac_reference`, …: Pearson, the step says where."""
    series: dict[str, dict[int, float]] = {}
    for sweep, section in SWEEPS.items():
        points: Sequence[Point] = getattr(outcome, sweep)
        for point in points:
            step = round(point.x * (PER_DAMPING if sweep == "dampings" else 1))
            name = f"{section}/{point.method}"
            for key, found in ((name, point.truth), (f"{name}_reference", point.reference)):
                if found is not None:
                    series.setdefault(key, {})[step] = found.pearson
            if sweep in ("lissa", "astra"):
                series.setdefault(f"{section}/seconds", {})[step] = point.seconds
    return series


def children(outcome: Outcome, by_seed: BySeed) -> list[Child]:
    """A run for each method and seed, to be compared: which method agrees best?"""
    found = []
    for name, each in outcome.methods.items():
        further = by_seed.get(name, [{}] * len(outcome.seeds))
        for seed, pearson, more in zip(outcome.seeds, each.by_seed, further, strict=True):
            told = {"benchmark": outcome.benchmark, "method": name, "seed": str(seed)}
            failed = None
            if pearson is None:
                failed = each.failed or "it has no number for this seed"
            found.append(
                Child(
                    name=f"{outcome.benchmark} {name} seed {seed}",
                    tags=told | ({"failed": failed, NOTE: failed} if failed else {}),
                    params=told,
                    metrics={"pearson": pearson, **more, **_over_seeds(each)},
                    failed=failed,
                )
            )
    return found


def _over_seeds(each: MethodOutcome) -> dict[str, float]:
    """What is known of all seeds together, in a section that says so."""
    named = {"seconds_fit": each.fit_seconds, "seconds_query": each.query_seconds}
    if each.truth:
        named |= {"pearson": each.truth.pearson, "spearman": each.truth.spearman}
    if each.exact:
        named["pearson_exact"] = each.exact.pearson
    return {f"all_seeds/{key}": value for key, value in named.items()}
