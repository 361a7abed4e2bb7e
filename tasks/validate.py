"""Stage `validate`: how far the numbers can be trusted, logged to MLflow."""

import time
from dataclasses import asdict
from typing import Any

from influence.statistics import Agreement
from tasks import figures, store
from tasks.attributed import PassReference
from tasks.baselines import agreements, baseline_scores, write_baselines
from tasks.halves import split_half
from tasks.health import layer_health, spectrum_curves
from tasks.logbook import validation_entry
from tasks.prepared import EKFAC, damping_grid
from tasks.ranking import read_influences
from tasks.recall import filter_recall
from tasks.retrieval import expected_means, retrieval
from tasks.tracking import record
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Write metrics.json, recall.json, expected.json, baselines.parquet and figures; log them."""
    started = time.time()
    reference = PassReference.of(context)
    seed = context.params.validate_.seed
    corpus = store.read_json(context.artifact("tokenize") / "summary.json")
    correct = context.artifact("correct")
    health = layer_health(context.artifact("factors"), context.artifact("eigen"), correct)
    influences = read_influences(context.artifact("stream"), corpus["num_sequences"])
    recall = filter_recall(context, influences, seed)
    baselines = baseline_scores(context, reference, influences)
    write_baselines(context, influences, baselines)
    expected = retrieval(context, influences, baselines)
    agreement = agreements(influences, baselines, seed)
    halves = split_half(context)
    overall, by_layer = halves.agreement(seed), halves.by_layer(seed)
    summary = store.read_json(context.artifact("score") / "summary.json")
    metrics: dict[str, Any] = {
        "split_half": asdict(overall),
        "low_rank": summary["rescore"],
        "filter": {key: recall[key] for key in ("recall", "low", "high") if key in recall},
        "baselines": {method: asdict(each) for method, each in agreement.items()},
        **({"expected": found} if (found := expected_means(expected)) else {}),
        "dampings": {
            method: asdict(Agreement.of(influences.of(EKFAC), influences.of(method), seed))
            for method in damping_grid(context.params)
        },
        # An expert that no token of the fit reached has no curvature to be healthy.
        "layers": {name: health.get(name, {}) | by_layer.get(name, {}) for name in halves.layers},
    }
    store.write_json(context.out / "metrics.json", metrics)
    store.write_json(context.out / "recall.json", recall)
    store.write_json(context.out / "expected.json", expected)
    figures.spectra(spectrum_curves(correct), context.out / "spectra.png")
    figures.halves(*halves.totals, overall.pearson, context.out / "split_half.png")
    figures.agreement(
        {name: (each.pearson, each.low, each.high) for name, each in agreement.items()},
        context.out / "baselines.png",
    )
    record(context.root, validation_entry(context, started, metrics, corpus))
