"""Top lists in the form of another program: a line a query for a viewer of attributions.

The schema is that of the data of Chang et al. 2024 (arXiv 2410.17413), which the viewer at
github.com/PAIR-code/pretraining-tda shows: proponents are the sequences that raise the completion,
opponents those that lower it, each list from the strongest on.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks import store
from tasks.workspace import ARTIFACTS

UNITS = {"nats": 1.0, "millinats": 1e3, "micronats": 1e6}
SIDES = {"proponent": "+", "opponent": "-"}
COLUMNS = ["query", "sign", "rank", "sequence", "influence", "tokens"]
# What the schema or this module gives a meaning: a query's own fields must not stand for it.
_TAKEN = {
    "name", "prompt", "completion", "prompt_tokens", "completion_tokens", "contrast_tokens",
    "example_id", "query_set", "inputs_plaintext", "targets_plaintext", "score_unit",
    *(f"{side}{part}" for side in SIDES for part in ("s", "_ids", "_scores")),
}  # fmt: skip


def tda_lines(root: Path, run: str, unit: str = "nats") -> Iterator[str]:
    """One JSON object a query, in the order of the query set.

    Args:
        root: the checkout.
        run: a run with scores.
        unit: of the scores, a key of `UNITS`. The viewer shows four decimals.

    Raises:
        ValueError: an unknown unit, or a run without scores.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; one of {', '.join(UNITS)} is wanted")
    folder = root / ARTIFACTS / run
    rows = store.read_table(folder / "score" / "top.parquet", COLUMNS).to_pylist()
    for query in store.read_json(folder / "query" / "queries.json"):
        line = _line(run, query, [row for row in rows if row["query"] == query["name"]], unit)
        yield json.dumps(line, ensure_ascii=False, allow_nan=False)


def _line(
    run: str, query: Mapping[str, Any], rows: list[dict[str, Any]], unit: str
) -> dict[str, Any]:
    """A query with its lists; what else the query set says of it goes along."""
    measure = "log p(completion | prompt)"
    if query.get("contrast"):
        measure += " − log p(contrast | prompt)"
    line = {
        "example_id": query["name"],
        "query_set": run,
        "inputs_plaintext": query["prompt"],
        "targets_plaintext": query["completion"],
        "score_unit": f"{unit} of {measure} per extra copy",
    }
    for side, sign in SIDES.items():
        chosen = sorted((row for row in rows if row["sign"] == sign), key=lambda row: row["rank"])
        line[f"{side}s"] = ["".join(row["tokens"]) for row in chosen]
        line[f"{side}_ids"] = [row["sequence"] for row in chosen]
        line[f"{side}_scores"] = [UNITS[unit] * row["influence"] for row in chosen]
    return line | {key: value for key, value in query.items() if key not in _TAKEN}
