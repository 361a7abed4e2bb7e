"""How well a run finds what its queries expect: a query set as a regression test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.retrieval import recall_at, reciprocal_rank, target_ranks
from tasks import store
from tasks.expected import Match, Target, expected_targets
from tasks.prepared import EKFAC
from tasks.ranking import Influences
from tasks.workspace import StageContext

CUTOFFS = (10, 100)
COUNTS = ("num_queries", "num_expected", "num_filtered")


@dataclass(frozen=True, slots=True)
class _Expecting:
    """A query as stage `query` described it."""

    name: str
    expected: Sequence[Match]


def retrieval(
    context: StageContext, influences: Influences, baselines: Mapping[str, Float[Tensor, "q n"]]
) -> dict[str, Any]:
    """Where the expected of each query stand among the candidates, by EK-FAC and each baseline."""
    queries = [
        _Expecting(query["name"], query.get("expected", ()))
        for query in store.read_json(context.artifact("query") / "queries.json")
    ]
    targets = expected_targets(queries, context.artifact("tokenize"), context.params.query.path)
    scores = {EKFAC: influences.of(EKFAC), **baselines}
    return found_expected(influences.queries, targets, influences.rows.tolist(), scores)


def expected_means(found: Mapping[str, Any]) -> dict[str, Any]:
    """The counts and the means by method, or nothing if no query expects anything."""
    if not found["num_queries"]:
        return {}
    return {**{key: found[key] for key in COUNTS}, **found["methods"]}


def found_expected(
    queries: Sequence[str],
    targets: Mapping[str, Sequence[Target]],
    rows: Sequence[int],
    scores: Mapping[str, Float[Tensor, "q n"]],
) -> dict[str, Any]:
    """Recall at 10 and 100 and reciprocal rank of each method, by query and on average.

    A target none of whose rows is a candidate is missed, and counted as `num_filtered`.

    Args:
        queries: their names, in the order of the scores.
        targets: of the queries that expect any.
        rows: the candidates.
        scores: by method, of every query and candidate.
    """
    place = {row: at for at, row in enumerate(rows)}
    each: dict[str, Any] = {}
    for q, name in enumerate(queries):
        if name not in targets:
            continue
        wanted = targets[name]
        groups = [
            torch.tensor([place[row] for row in target.rows if row in place], dtype=torch.int64)
            for target in wanted
        ]
        ranks = {method: target_ranks(values[q], groups) for method, values in scores.items()}
        each[name] = {
            "num_expected": len(wanted),
            "num_filtered": sum(not len(group) for group in groups),
            "methods": {method: _measures(found) for method, found in ranks.items()},
            "targets": [
                {
                    "name": target.name,
                    "num_sequences": len(target.rows),
                    "ranks": {m: _whole(found[at]) for m, found in ranks.items()},
                }
                for at, target in enumerate(wanted)
            ],
        }
    return {"num_queries": len(each), **(_overall(each) if each else {}), "queries": each}


def _measures(ranks: Sequence[float]) -> dict[str, float]:
    recalls = {f"recall_{k}": recall_at(ranks, k) for k in CUTOFFS}
    return {**recalls, "mrr": reciprocal_rank(ranks)}


def _whole(rank: float) -> int | None:
    return int(rank) if math.isfinite(rank) else None


def _overall(each: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of all queries and means over them."""
    first = next(iter(each.values()))["methods"]
    return {
        **{key: sum(one[key] for one in each.values()) for key in ("num_expected", "num_filtered")},
        "methods": {
            method: {
                measure: sum(one["methods"][method][measure] for one in each.values()) / len(each)
                for measure in measures
            }
            for method, measures in first.items()
        },
    }
