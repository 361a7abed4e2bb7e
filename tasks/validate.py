"""Stage `validate`: how far the numbers can be trusted, logged to MLflow."""

from collections.abc import Mapping
from dataclasses import asdict

from tasks import figures, store
from tasks.attributed import PassReference
from tasks.baselines import agreements, baseline_scores, write_baselines
from tasks.halves import split_half
from tasks.health import layer_health, spectrum_curves
from tasks.ranking import read_influences
from tasks.recall import filter_recall
from tasks.tracking import log_validation
from tasks.workspace import StageContext

TABLES = ("metrics.json", "recall.json", "baselines.parquet")


def run(context: StageContext) -> None:
    """Write metrics.json, recall.json, baselines.parquet and figures; log them."""
    reference = PassReference.of(context)
    seed = context.params.validate_.seed
    corpus = store.read_json(context.artifact("tokenize") / "summary.json")
    correct = context.artifact("correct")
    health = layer_health(context.artifact("factors"), context.artifact("eigen"), correct)
    influences = read_influences(context.artifact("stream"), corpus["num_sequences"])
    recall = filter_recall(context, influences, seed)
    baselines = baseline_scores(context, reference, influences)
    write_baselines(context, influences, baselines)
    agreement = agreements(influences, baselines, seed)
    halves, scores = split_half(context)
    summary = store.read_json(context.artifact("score") / "summary.json")
    metrics: dict[str, object] = {
        "split_half": asdict(halves),
        "low_rank": summary["rescore"],
        "filter": {key: recall[key] for key in ("recall", "low", "high") if key in recall},
        "baselines": {method: asdict(each) for method, each in agreement.items()},
        "layers": health,
    }
    store.write_json(context.out / "metrics.json", metrics)
    store.write_json(context.out / "recall.json", recall)
    figures.spectra(spectrum_curves(correct), context.out / "spectra.png")
    figures.halves(scores[0], scores[1], halves.pearson, context.out / "split_half.png")
    figures.agreement(
        {name: (each.pearson, each.low, each.high) for name, each in agreement.items()},
        context.out / "baselines.png",
    )
    log_validation(
        context,
        metrics=flat(metrics),
        params=flat(context.params.model_dump(mode="json", by_alias=True)),
        figures={file.name: file for file in sorted(context.out.glob("*.png"))},
        tables={name: context.out / name for name in TABLES},
    )


def flat(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted name; what is missing (None) is left out."""
    leaves: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            leaves[f"{prefix}{key}"] = value
    return leaves
