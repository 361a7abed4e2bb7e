"""The top sequences of a run as lines for a terminal."""

import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tasks import store
from tasks.grouped import Group, grouped
from tasks.workspace import ARTIFACTS

COLUMNS = [
    "query", "sign", "rank", "sequence", "group", "influence", "tokens", "token_influence"
]  # fmt: skip
LEAD = 0.4  # of a snippet that stands before its strongest token


def top_lines(
    root: Path, run: str, query: str | None = None, limit: int = 5, duplicates: bool = False
) -> Iterator[str]:
    """The highest and lowest sequences of each query whose name contains `query`.

    A group of duplicates is one line, that of its first; with `duplicates` the others stand below.

    Raises:
        ValueError: if the run has no scores, or no query of that name.
    """
    folder = root / ARTIFACTS / run
    rows = store.read_table(folder / "score" / "top.parquet", COLUMNS).to_pylist()
    told = folder / "validate" / "expected.json"
    expected = store.read_json(told)["queries"] if told.is_file() else {}
    asked = {each["name"]: each for each in store.read_json(folder / "query" / "queries.json")}
    names = [name for name in asked if query is None or query in name]
    if not names:
        raise ValueError(f"run {run} has no query named like {query!r}; it has {', '.join(asked)}")
    width = shutil.get_terminal_size((100, 24)).columns
    yield "influence in nats of log p(completion | prompt) per extra copy; + raises it"
    for name in names:
        yield ""
        yield f"{name}: {flat(asked[name]['prompt'])} → {said(asked[name])}"
        if name in expected:
            yield expected_line(expected[name])
        asked_for = (row for row in rows if row["query"] == name)
        for _, signed in groupby(asked_for, key=lambda row: row["sign"]):
            for group in grouped(signed)[:limit]:
                yield line(group.first, width, more(group))
                yield from (f"  {line(row, width - 2)}" for row in group.others if duplicates)


def said(query: Mapping[str, Any]) -> str:
    """The completion of a query, whether the model wrote it, and what it is held against."""
    contrast = query.get("contrast")
    written = " (generated)" if query.get("generated") else ""
    rather = f" (rather than {flat(contrast)})" if contrast else ""
    return flat(query["completion"]) + written + rather


def expected_line(found: Mapping[str, Any]) -> str:
    """What the query expected, with the rank of each by EK-FAC, and how BM25 does."""
    ranks = ", ".join(
        f"{target['name']} #{target['ranks']['ekfac']}"
        if target["ranks"]["ekfac"] is not None
        else f"{target['name']} not scored (filtered out)"
        for target in found["targets"]
    )
    ours, words = found["methods"]["ekfac"], found["methods"]["bm25"]
    return (
        f"  expected: {ranks}; recall at 10 {ours['recall_10']:.0%} (BM25 "
        f"{words['recall_10']:.0%}), reciprocal rank {ours['mrr']:.2g} ({words['mrr']:.2g})"
    )


def top_rows(root: Path, run: str, limit: int) -> Iterator[dict[str, Any]]:
    """The highest and lowest sequences of every query, a row each, for a table."""
    rows = store.read_table(root / ARTIFACTS / run / "score" / "top.parquet", COLUMNS).to_pylist()
    for _, signed in groupby(rows, key=lambda row: (row["query"], row["sign"])):
        for group in grouped(signed)[:limit]:
            row = group.first
            yield {
                "query": row["query"],
                "rank": f"{'+' if row['influence'] >= 0 else '−'}{row['rank']}",
                "influence": float(f"{row['influence']:.4g}"),
                "sequence": row["sequence"],
                "near duplicates": len(group.others),
                "text": snippet(row["tokens"], row["token_influence"], 100),
            }


def more(group: Group) -> str:
    """How many of the top say the same; nothing where none does."""
    count = len(group.others)
    return f"  (+{count} near duplicate{'s' if count > 1 else ''})" if count else ""


def line(row: Mapping[str, Any], width: int, tail: str = "") -> str:
    """Influence, id and the part of the text around the token that did most."""
    head = f"  {row['influence']:+10.2e}  {row['sequence']:<16}  "
    room = max(20, width - len(head) - len(tail))
    return head + snippet(row["tokens"], row["token_influence"], room) + tail


def snippet(tokens: list[str], influence: list[float], width: int) -> str:
    """At most `width` characters of the text around the token of largest absolute influence."""
    strongest = max(range(len(influence)), key=lambda t: abs(influence[t]), default=0)
    before, text = len(flat("".join(tokens[:strongest]))), flat("".join(tokens))
    start = max(0, min(before - round(LEAD * width), len(text) - width))
    shown = text[start : start + width]
    shown = f"…{shown[1:]}" if start else shown
    return f"{shown[:-1]}…" if start + width < len(text) else shown


def flat(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())
