"""The header of the page: what was measured, on what, with which settings."""

import base64
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.page.evidence import Evidence
from tasks.page.health import Verdict, flattened, verdicts
from tasks.page.numbers import percent, plain, ratio


@dataclass(frozen=True, slots=True)
class Damping:
    """The rule, and by layer: λ, a bar relative to the largest, and what `measured` names."""

    rule: str
    layers: tuple[tuple[str, str, float, tuple[str, ...]], ...]
    measured: tuple[str, ...]
    lowest: str
    highest: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Modules without a score, for one reason."""

    reason: str
    modules: tuple[tuple[str, str], ...]
    num_parameters: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything above the first query."""

    run: str
    title: str
    model: str
    kind: str
    num_parameters: str
    corpus: str
    num_documents: str
    num_tokens: str
    sequences: str
    num_training_sequences: str
    sign: str
    unit: str
    label_source: str
    fit: str
    num_layers: int
    share: str
    share_bar: float
    attributed: str
    left_out: tuple[LeftOut, ...]
    damping: Damping
    search: str
    filter: str
    verdicts: tuple[Verdict, ...]
    metrics: tuple[tuple[str, str], ...]
    plots: tuple[tuple[str, str], ...]
    digests: tuple[tuple[str, str], ...]


_KINDS = {
    "scratch": "trained from scratch on this corpus",
    "finetuned": "trained on, on this corpus",
}


def facts(evidence: Evidence) -> Facts:
    """The header of a page about `evidence`."""
    summary = evidence.summary
    model, corpus, coverage = summary["model"], summary["corpus"], summary["coverage"]
    return Facts(
        run=evidence.run,
        title=evidence.title,
        model=str(model["source"]),
        kind=_KINDS.get(model.get("kind"), ""),
        num_parameters=_count(model.get("parameters")),
        corpus=str(corpus["path"]),
        num_documents=_count(corpus.get("num_documents")),
        num_tokens=_count(corpus.get("num_tokens")),
        sequences=_sequences(corpus),
        num_training_sequences=_count(summary["num_training_sequences"]),
        sign=str(summary.get("sign", "")),
        unit=str(summary.get("unit", "")),
        label_source=str(summary.get("label_source", "")),
        fit=_fit(summary.get("fit") or {}),
        num_layers=len(summary["layers"]),
        share=percent(coverage["share"]),
        share_bar=round(100 * coverage["share"], 1),
        attributed=_attributed(coverage, summary["layers"]),
        left_out=_left_out(coverage.get("left_out", ())),
        damping=_damping(summary["damping"], evidence.metrics.get("layers") or {}),
        search=_search(summary),
        filter=_filter({**evidence.recall, **(summary.get("filter") or {})}),
        verdicts=tuple(
            verdicts(
                evidence.metrics,
                evidence.recall,
                summary.get("rescore") or {},
                evidence.ground_truth,
                shared=bool(summary.get("subspace")),
            )
        ),
        metrics=tuple(flattened({k: v for k, v in evidence.metrics.items() if k != "layers"})),
        plots=tuple(
            (name, "data:image/png;base64," + base64.b64encode(content).decode("ascii"))
            for name, content in sorted(evidence.plots.items())
        ),
        digests=tuple(_digests(summary)),
    )


def _search(summary: Mapping[str, Any]) -> str:
    """What all candidates met; of a shared subspace, what the layer loses that loses most."""
    told = f"query gradients of rank {summary.get('rank') or 'full'}"
    lost = summary.get("subspace")
    if not lost:
        return told
    return f"{told}, up to {percent(max(lost.values()))} of them outside the shared subspace"


def _count(value: Any) -> str:
    return f"{int(value):,}" if value is not None else "unknown"


def _attributed(coverage: Mapping[str, Any], layers: list[str]) -> str:
    """Number of parameters with a score; section B allows a number or the names."""
    value = coverage.get("num_attributed", coverage.get("attributed"))
    return _count(value) if isinstance(value, int) else f"those of {len(layers)} layers"


def _sequences(corpus: Mapping[str, Any]) -> str:
    """What a sequence is in this run."""
    if corpus.get("mode") == "pack":
        return f"documents packed into windows of {_count(corpus.get('context'))} tokens"
    context = corpus.get("context")
    return f"a document each, cut at {_count(context)} tokens" if context else ""


def _fit(fit: Mapping[str, Any]) -> str:
    if "factors" not in fit or "spectrum" not in fit:
        return ""
    return f"A, S from {_count(fit['factors'])} sequences, Λ from {_count(fit['spectrum'])}"


def _left_out(modules: Any) -> tuple[LeftOut, ...]:
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for module in modules:
        by_reason[module["reason"]].append(module)
    return tuple(
        LeftOut(
            reason,
            tuple((one["name"], _count(one["num_parameters"])) for one in members),
            _count(sum(one["num_parameters"] for one in members)),
        )
        for reason, members in sorted(
            by_reason.items(), key=lambda pair: -sum(one["num_parameters"] for one in pair[1])
        )
    )


def _damping(damping: Mapping[str, Any], health: Mapping[str, Mapping[str, Any]]) -> Damping:
    values: Mapping[str, float] = damping["layers"]
    measured = [
        key
        for key, value in next(iter(health.values()), {}).items()
        if isinstance(value, int | float)
    ]
    largest = max(values.values(), default=0.0)
    rule = damping["rule"]
    return Damping(
        rule=rule if isinstance(rule, str) else _rule(rule),
        layers=tuple(
            (
                name,
                plain(value),
                round(100 * ratio(value, largest), 1),
                tuple(_measured(health.get(name, {}).get(key)) for key in measured),
            )
            for name, value in values.items()
        ),
        measured=tuple(key.replace("_", " ") for key in measured),
        lowest=plain(min(values.values(), default=0.0)),
        highest=plain(largest),
    )


def _measured(value: float | None) -> str:
    return "–" if value is None else plain(value)


def _rule(rule: Mapping[str, Any]) -> str:
    """The YAML of a damping rule in words: {ratio: 0.1} or {value: 1e-3}."""
    if "ratio" in rule:
        return f"{rule['ratio']:g} × mean Λ of the layer"
    if "value" in rule:
        return f"{plain(rule['value'])} in every layer"
    return ", ".join(f"{key} {value}" for key, value in rule.items())


def _filter(recall: Mapping[str, Any]) -> str:
    method = recall.get("method")
    if method in (None, "none"):
        return "none: every sequence is scored"
    words = {"tfidf": "TF-IDF"}.get(str(method), str(method))
    top, audit = recall.get("top"), recall.get("audit")
    kept = f", the best {top:,} sequences of each query" if isinstance(top, int) else ""
    audited = f"; audited on {audit:,} rejected ones" if isinstance(audit, int) else ""
    return f"{words}{kept}{audited}"


def _digests(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every value of the summary whose key speaks of a digest, once, with where it stood."""
    found: list[tuple[str, str]] = []
    for key, value in summary.items():
        if isinstance(value, Mapping):
            whole = "digest" in key
            found += [
                (name if whole else f"{key} {name}", str(digest))
                for name, digest in value.items()
                if isinstance(digest, str) and (whole or "digest" in name)
            ]
        elif "digest" in key or key == "fingerprint":
            found.append((key, str(value)))
    first = {digest: name.replace("_", " ") for name, digest in reversed(found)}
    return [(name, digest) for digest, name in reversed(first.items())]
