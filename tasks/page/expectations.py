"""What a query expected, and where each method put it, as the templates print it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.page.numbers import percent, plain

METHODS = {
    "ekfac": "EK-FAC",
    "gradient_dot": "Gradient dot",
    "tfidf": "TF-IDF",
    "bm25": "BM25",
}
MISSED = "not scored"


@dataclass(frozen=True, slots=True)
class Expectations:
    """Of one query: a sentence, and a table of ranks with the measures below.

    Attributes:
        told: how many were found early by EK-FAC, and how many were never scored.
        methods: the columns.
        targets: name and rank by each method.
        measures: name and value by each method.
        names: of the targets, to tell them among the neighbours.
    """

    told: str
    methods: tuple[str, ...]
    targets: tuple[tuple[str, tuple[str, ...]], ...]
    measures: tuple[tuple[str, tuple[str, ...]], ...]
    names: frozenset[str]


def expectations(found: Mapping[str, Any] | None) -> Expectations | None:
    """From a query's entry in expected.json; None if it expects nothing."""
    if not found:
        return None
    methods = [method for method in METHODS if method in found["methods"]]
    targets = found["targets"]
    ranks = [target["ranks"]["ekfac"] for target in targets]
    early = sum(rank is not None and rank <= 10 for rank in ranks)
    told = f"{early} of {len(targets)} in the first 10"
    if found["num_filtered"]:
        told += f", {found['num_filtered']} {MISSED}: the filter kept them out"
    return Expectations(
        told,
        tuple(METHODS[method] for method in methods),
        tuple(
            (target["name"], tuple(_rank(target["ranks"][method]) for method in methods))
            for target in targets
        ),
        tuple(
            (label, tuple(shown(found["methods"][method][measure]) for method in methods))
            for measure, (label, shown) in _MEASURES.items()
        ),
        frozenset(target["name"] for target in targets),
    )


def _share(value: float) -> str:
    return percent(value, 0)


def _mrr(value: float) -> str:
    return plain(value, 2)


_MEASURES = {
    "recall_10": ("recall at 10", _share),
    "recall_100": ("recall at 100", _share),
    "mrr": ("reciprocal rank", _mrr),
}


def _rank(rank: int | None) -> str:
    return MISSED if rank is None else f"#{rank:,}"
