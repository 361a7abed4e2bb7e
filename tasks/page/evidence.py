"""What a page is made from, checked before anything is drawn."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.grouped import Group, grouped

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Facts of one run, as its stages wrote them (artifacts/<run>/…).

    summary: score/summary.json. queries: query/queries.json. top: rows of score/top.parquet.
    expected: validate/expected.json. baselines: rows of validate/baselines.parquet.
    plots: PNG files of validate by name.
    ground_truth: what the benchmarks found, for the whole project.
    """

    run: str
    title: str
    summary: Mapping[str, Any]
    queries: Sequence[Row]
    top: Sequence[Row]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recall: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    baselines: Sequence[Row] = ()
    plots: Mapping[str, bytes] = field(default_factory=dict)
    ground_truth: Sequence[Row] = ()

    def checked(self) -> "Evidence":
        """Itself. A ValueError names the row where the artefacts contradict each other."""
        if not self.queries:
            raise ValueError("queries.json holds no query: the report needs one; rerun `query`")
        known = {query["name"] for query in self.queries}
        num_layers = len(self.summary["layers"])
        for row in self.top:
            where = f"top.parquet, query {row['query']!r}, {row['sign']}{row['rank']}"
            if row["query"] not in known:
                raise ValueError(f"{where}: queries.json has no such query; rerun `score`")
            if len(row["tokens"]) != len(row["token_influence"]):
                raise ValueError(
                    f"{where}: {len(row['tokens'])} tokens with {len(row['token_influence'])} "
                    "token influences, wanted one each; rerun `score`"
                )
            if len(row["layers"]) != num_layers:
                raise ValueError(
                    f"{where}: influence of {len(row['layers'])} layers, wanted {num_layers} as in "
                    "summary.json; rerun `score`"
                )
            if not all(map(math.isfinite, (row["influence"], *row["token_influence"]))):
                raise ValueError(f"{where}: an influence is not finite; rerun `stream` and `score`")
        return self

    def neighbours(self, query: str, sign: str, most: int) -> list[Group]:
        """The first `most` groups of duplicates of a query on one side ("+" or "-"), by rank."""
        rows = (row for row in self.top if row["query"] == query and row["sign"] == sign)
        return grouped(rows)[:most]


@dataclass(frozen=True, slots=True)
class Baselines:
    """Ranks that simpler methods give to the same candidates."""

    rows: Mapping[tuple[str, int], Row]
    num_candidates: Mapping[str, int]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Baselines":
        """Indexed by (query, row of the corpus)."""
        count: dict[str, int] = defaultdict(int)
        for row in rows:
            count[row["query"]] += 1
        return cls({(row["query"], row["row"]): row for row in rows}, dict(count))

    def rank(self, query: str, row: int, method: str) -> str:
        """ "#12", or a dash where the method has not ranked the sequence."""
        found = self.rows.get((query, row), {}).get(f"{method}_rank")
        return f"#{int(found):,}" if found is not None and found == found else "–"
