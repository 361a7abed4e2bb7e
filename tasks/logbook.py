"""What MLflow is told of one execution of `validate`: names, tags, numbers and files."""

from collections.abc import Mapping
from typing import Any

from tasks import lineage
from tasks.registry import Dataset, Factors
from tasks.tracking import NOTE, Entry
from tasks.workspace import ARTIFACTS, Context, StageContext

METRICS = "metrics.json"
TABLES = (METRICS, "recall.json", "expected.json", "baselines.parquet")
# MLflow draws metrics that share what is before the slash in one section.
BY_LAYER = "by_layer"  # series, a step a layer: the shape over the depth
HALVES_BY_LAYER = "split_half_by_layer"  # the one that a layer is judged by, with its name
FITTED = ("train", "tokenize", "factors", "eigen", "correct")


def validation_entry(
    context: StageContext, started: float, metrics: Mapping[str, Any], corpus: Mapping[str, Any]
) -> Entry:
    """The entry of a finished `validate`, its files still in `context.out`.

    Args:
        context: of the stage.
        started: when, in seconds since the epoch.
        metrics: what metrics.json holds.
        corpus: what summary.json of stage tokenize holds.
    """
    params = context.params.model_dump(mode="json", by_alias=True)
    tags = lineage.tags(context)
    tags |= {NOTE: note(context, metrics, tags), **source_tags(context, tags)}
    return Entry(
        name=run_name(context.run, params["query"], tags.get("dvc.exp")),
        started=started,
        metrics_file=context.out / METRICS,
        tags=tags,
        params=flat(params),
        metrics=metrics_by_section(metrics),
        series=layer_series(metrics["layers"]),
        artifacts={
            "figures": sorted(context.out.glob("*.png")),
            "tables": [context.out / name for name in TABLES],
        },
        dataset=scored_corpus(corpus, tags),
        factors=fitted_factors(context, params, tags),
    )


def run_name(run: str, query: Mapping[str, Any], experiment: str | None) -> str:
    """What tells runs apart in a legend: run, damping, rank, DVC's experiment."""
    damping = " ".join(f"{rule}={value:g}" for rule, value in query["damping"].items())
    words = [run, damping, f"rank={query['rank'] or 'full'}"]
    return " ".join(words + ([f"({experiment})"] if experiment else []))


def source_tags(context: Context, tags: Mapping[str, str]) -> dict[str, str]:
    """What MLflow's own columns show of the source."""
    return {
        "mlflow.source.name": f"python -m flows.stage {context.stage} {context.run}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": tags["git.commit"],
    }


def note(context: StageContext, metrics: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """The run's description: the result in a line, and where everything is. Markdown."""
    halves = metrics["split_half"]
    layers = {
        name: each["split_half"] for name, each in metrics["layers"].items() if "split_half" in each
    }
    lines = [
        f"Split halves agree with r = {halves['pearson']:.3f} ({halves['low']:.3f} to "
        f"{halves['high']:.3f})."
    ]
    if layers:
        best, worst = max(layers, key=layers.__getitem__), min(layers, key=layers.__getitem__)
        lines.append(
            f"Best layer: `{best}` ({layers[best]:.3f}); worst: `{worst}` ({layers[worst]:.3f})."
        )
    low_rank, recall = metrics["low_rank"]["pearson_control"], metrics["filter"]["recall"]
    if low_rank is not None:
        lines.append(f"Truncated against full rank: r = {low_rank:.4f}.")
    lines.append(f"The filter kept {recall:.0%} of the most influential sequences.")
    if expected := metrics.get("expected"):
        lines.append(
            f"Of what {expected['num_queries']} queries expect, recall at 10 is "
            f"{expected['ekfac']['recall_10']:.0%} (BM25 {expected['bm25']['recall_10']:.0%})."
        )
    where = [f"Files: `{ARTIFACTS / context.run}`; the report is the artifact `report/index.html`."]
    if experiment := tags.get("dvc.exp"):
        where.append(f"Experiment: `dvc exp apply {experiment}`.")
    if url := tags.get("prefect.url"):
        where.append(f"[Flow run in Prefect]({url}).")
    return " ".join(lines) + "\n\n" + " ".join(where)


def metrics_by_section(metrics: Mapping[str, Any]) -> dict[str, object]:
    """`split_half/pearson`, `baselines/bm25.spearman`, …; of the layers, how far they agree.

    The first is what MLflow's compare page shows unasked. Counts are no results: they stay in the
    table.
    """
    named = {
        f"{section}/{key}": value
        for section, values in metrics.items()
        if section != "layers"
        for key, value in flat(values).items()
        if not key.split(".")[-1].startswith("num_")
    }
    for name, values in metrics["layers"].items():
        if "split_half" in values:
            named[f"{HALVES_BY_LAYER}/{name}"] = values["split_half"]
    return named


def layer_series(layers: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Each quantity over the depth of the model, a step a layer; NaN where a layer lacks it."""
    quantities = dict.fromkeys(quantity for each in layers.values() for quantity in each)
    return {
        f"{BY_LAYER}/{quantity}": [each.get(quantity, float("nan")) for each in layers.values()]
        for quantity in quantities
    }


def scored_corpus(corpus: Mapping[str, Any], tags: Mapping[str, str]) -> Dataset | None:
    """The corpus with DVC's md5 of it; of a far one, of its description."""
    path = corpus["corpus"]["path"]
    watched = corpus["corpus"].get("record", path)
    sizes = {key: corpus[key] for key in ("num_documents", "num_sequences", "num_tokens")}
    md5 = tags.get(f"dvc.in.{watched}")
    return Dataset(path, md5, "candidates", sizes) if md5 else None


def fitted_factors(
    context: StageContext, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Factors | None:
    """The factors with DVC's md5 of them, and what decides them: digests and sizes."""
    md5 = tags.get("dvc.out.factors")
    if md5 is None:
        return None
    path = context.artifact("factors").relative_to(context.root).as_posix()
    digests = {key: tags[key] for key in tags if key.removeprefix("dvc.out.") in FITTED}
    sizes = {f"{name}.sequences": str(params[name]["sequences"]) for name in ("factors", "correct")}
    told = {"fit": tags["fit"], "layers": " ".join(params["layers"]), **sizes, **digests}
    return Factors(f"{tags['fit']}-factors", path, md5, told)


def flat(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted name."""
    leaves: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
