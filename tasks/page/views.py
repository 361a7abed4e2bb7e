"""Queries and their neighbours as the templates print them: every number already a text."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tasks.grouped import Group
from tasks.page.evidence import Baselines, Evidence, Row
from tasks.page.expectations import Expectations, expectations
from tasks.page.numbers import Nats, change_in_probability, plain, ratio
from tasks.page.pictures import Rows, Strip, layer_strip, profile, token_map
from tasks.page.shading import ShadedText, shaded_text
from tasks.spans import covered, shared_spans

SPURIOUS = 2 / 3  # Grosse et al. 2023, §5.3: above, one token carries the whole score
_METHODS = {"gradient_dot": "Gradient dot", "tfidf": "TF-IDF", "bm25": "BM25"}
_WINDOW_CHARACTERS = 420
_LONG_PROMPT = 700
_OWN_FIELDS = {
    *("name", "prompt", "completion", "note", "log_probability"),
    *("tags", "expected", "generated"),
}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One training sequence beside a query."""

    anchor: str
    rank: int
    score: str
    change: str
    bar: float
    sequence: str
    documents: tuple[str, ...]
    is_expected: bool
    metadata: tuple[tuple[str, str], ...]
    text: ShadedText
    num_tokens: int
    num_shared: int
    darkest: str
    strip: Strip
    strongest: tuple[tuple[str, str, str], ...]
    token_map: str
    ranks: tuple[tuple[str, str], ...]
    low_rank: str
    sparsity: str
    spurious: bool
    duplicates: tuple["Neighbour", ...]


@dataclass(frozen=True, slots=True)
class QueryView:
    """A query, its neighbours on both sides and a line for the index."""

    number: int
    anchor: str
    name: str
    details: tuple[tuple[str, str], ...]
    tags: tuple[str, ...]
    is_generated: bool
    expected: Expectations | None
    prompt_head: str
    prompt: str
    completion_gap: str
    completion: str
    note: str
    measure: str
    log_probability: str
    per_token: str
    unit: str
    num_candidates: str
    profile: Strip
    positive: tuple[Neighbour, ...]
    negative: tuple[Neighbour, ...]


def query_views(evidence: Evidence, most: int) -> list[QueryView]:
    """All queries in the order of queries.json, with up to `most` neighbours a side."""
    frame = _Frame(
        evidence,
        most,
        Baselines.of(evidence.baselines),
        Rows.of(evidence.summary["layers"]),
        unit(evidence).exponent,
    )
    return [
        _query_view(frame, query, number) for number, query in enumerate(evidence.queries, start=1)
    ]


def tag_counts(queries: Sequence[QueryView]) -> dict[str, int]:
    """How many queries have each tag, in the order in which tags first come."""
    return dict(Counter(tag for query in queries for tag in query.tags))


def unit(evidence: Evidence) -> Nats:
    """One unit for the whole page, so that queries compare: it suits the median query's best."""
    largest: dict[str, float] = {}
    for row in evidence.top:
        largest[row["query"]] = max(largest.get(row["query"], 0.0), abs(row["influence"]))
    return Nats.of(median(largest.values()) if largest else 0.0)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all queries share."""

    evidence: Evidence
    most: int
    baselines: Baselines
    rows: Rows
    exponent: int


@dataclass(frozen=True, slots=True)
class _Scale:
    """What all neighbours of a query share."""

    text: str
    largest: float
    nats: Nats
    expected: frozenset[str]


def _query_view(frame: _Frame, query: Row, number: int) -> QueryView:
    name, prompt, anchor = query["name"], query["prompt"], f"q{number}"
    sides = [frame.evidence.neighbours(name, sign, frame.most) for sign in "+-"]
    scores = [
        row["influence"] for side in sides for group in side for row in (group.first, *group.others)
    ]
    largest = max(map(abs, scores), default=0.0)
    expected = expectations(frame.evidence.expected.get("queries", {}).get(name))
    scale = _Scale(
        prompt + query["completion"],
        largest,
        Nats.of(largest, frame.exponent),
        expected.names if expected else frozenset(),
    )
    positive, negative = (
        tuple(_neighbour(frame, scale, group, f"{anchor}{mark}") for group in side)
        for side, mark in zip(sides, "pn", strict=True)
    )
    cut = max(0, len(prompt) - _LONG_PROMPT)
    # Its first space stands outside the box that marks it (a completion may be spaces alone).
    completion = query["completion"].lstrip() or query["completion"]
    num_candidates = frame.baselines.num_candidates.get(name)
    return QueryView(
        number=number,
        anchor=anchor,
        name=name,
        details=fields({key: query[key] for key in query if not _is_own(key)}),
        tags=tuple(map(str, query.get("tags") or ())),
        is_generated=bool(query.get("generated")),
        expected=expected,
        prompt_head=prompt[:cut],
        prompt=prompt[cut:],
        completion_gap=query["completion"][: len(query["completion"]) - len(completion)],
        completion=completion,
        note=str(query.get("note") or ""),
        measure="log p − log p(contrast)" if query.get("contrast") else "log p",
        log_probability=_log_probability(query),
        per_token=_per_token(query),
        unit=scale.nats.unit,
        num_candidates=f"{num_candidates:,}" if num_candidates else "",
        profile=profile(scores, scale.nats),
        positive=positive,
        negative=negative,
    )


def _neighbour(frame: _Frame, scale: _Scale, group: Group, side: str) -> Neighbour:
    nats, row = scale.nats, group.first
    tokens, influence = list(row["tokens"]), [float(value) for value in row["token_influence"]]
    text = "".join(tokens)
    marks = shared_spans(text, scale.text)
    width = max(16, round(_WINDOW_CHARACTERS * len(tokens) / max(1, len(text))))
    grid, sparsity = row.get("layer_token_influence"), row.get("sparsity")
    low_rank = row.get("influence_low_rank")
    return Neighbour(
        anchor=f"{side}{row['rank']}",
        rank=row["rank"],
        score=nats.signed(row["influence"]),
        change=change_in_probability(row["influence"]),
        bar=round(100 * ratio(row["influence"], scale.largest), 1),
        sequence=str(row["sequence"]),
        documents=tuple(str(document) for document in row.get("documents") or ()),
        is_expected=not scale.expected.isdisjoint((row["sequence"], *(row.get("documents") or ()))),
        metadata=fields(_json_object(row.get("metadata"))),
        text=shaded_text(tokens, influence, marks, width, nats),
        num_tokens=len(tokens),
        num_shared=len(covered(marks)),
        darkest=nats.signed(max(map(abs, influence), default=0.0), nats.decimals + 1)[1:],
        strip=layer_strip(frame.rows, row["layers"], nats),
        strongest=_strongest(tokens, influence, nats),
        token_map=token_map(frame.rows, grid) if grid is not None and len(grid) else "",
        ranks=tuple(
            (label, frame.baselines.rank(row["query"], row["row"], method))
            for method, label in _METHODS.items()
        ),
        low_rank=nats.signed(low_rank) if low_rank is not None else "",
        sparsity=plain(sparsity, 2) if sparsity is not None else "",
        spurious=sparsity is not None and sparsity > SPURIOUS,
        duplicates=tuple(_neighbour(frame, scale, Group(other), side) for other in group.others),
    )


def _strongest(
    tokens: Sequence[str], influence: Sequence[float], nats: Nats
) -> tuple[tuple[str, str, str], ...]:
    """(token, next token, influence) of the four strongest, in words: no colour needed."""
    order = sorted(range(len(tokens)), key=lambda at: -abs(influence[at]))[:4]
    return tuple(
        (
            tokens[at],
            tokens[at + 1] if at + 1 < len(tokens) else "",
            nats.signed(influence[at], nats.decimals + 1),
        )
        for at in order
        if influence[at]
    )


def fields(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and values of free-form metadata as text; empty values are left out."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
        if value not in (None, "", [], {})
    }
    return tuple((key, shortened(text, 160)) for key, text in texts.items())


def shortened(text: str, length: int) -> str:
    """At most `length` characters, and then an ellipsis."""
    return text if len(text) <= length else text[:length] + "…"


def _json_object(text: str | None) -> Mapping[str, Any]:
    if not text:
        return {}
    value = json.loads(text)
    return value if isinstance(value, dict) else {"metadata": value}


def _is_own(key: str) -> bool:
    return key in _OWN_FIELDS or key.endswith("_tokens")


def _log_probability(query: Row) -> str:
    value = query.get("log_probability")
    return f"{plain(value, 4)} nats" if value is not None else ""


def _per_token(query: Row) -> str:
    """Mean nats a token of the completion, where both are known."""
    value, tokens = query.get("log_probability"), query.get("completion_tokens")
    if value is None or tokens is None or query.get("contrast"):
        return ""
    num_tokens = tokens if isinstance(tokens, int) else len(tokens)
    return f"{plain(value / max(1, num_tokens), 3)} per token over {num_tokens} tokens"
