"""What the numbers of `validate` say about this run, in plain language."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.page.numbers import correlation, percent, plain

Grade = Literal["good", "fair", "poor", "note"]
GRADES: Mapping[Grade, str] = {
    "good": "good",
    "fair": "fair",
    "poor": "poor",
    "note": "for information",
}
_RIVALS = {"tfidf": "TF-IDF", "bm25": "BM25", "gradient_dot": "gradient dot product"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measured quantity, its value and what follows from it."""

    name: str
    value: str
    grade: Grade
    sentence: str

    @property
    def word(self) -> str:
        """The grade as a word: colour and sign are never its only carrier."""
        return GRADES[self.grade]


def verdicts(
    metrics: Mapping[str, Any],
    recall: Mapping[str, Any],
    rescore: Mapping[str, Any],
    ground_truth: Sequence[Mapping[str, Any]] = (),
    shared: bool = False,
) -> list[Verdict]:
    """A verdict on every quantity that was measured; what is absent is left out.

    `shared`: the queries met the candidates in a subspace.
    """
    measured = (
        _split_half(metrics.get("split_half")),
        _trace(metrics.get("layers")),
        _low_rank(metrics.get("low_rank") or rescore, shared),
        _recall(recall),
        _dampings(metrics.get("dampings")),
        *_rivals(metrics.get("baselines")),
        _expected(metrics.get("expected")),
        _ground_truth(ground_truth),
    )
    return [verdict for verdict in measured if verdict is not None]


def flattened(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number and word of `metrics` with its path, for the table at the end."""
    for key, value in metrics.items():
        path = f"{prefix} / {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flattened(value, path)
        elif isinstance(value, bool | str):
            yield path, str(value)
        elif isinstance(value, int):
            yield path, f"{value:,}"
        elif isinstance(value, float):
            yield path, plain(value, 4)


def _graded(value: float, good: float, fair: float) -> Grade:
    return "good" if value >= good else "fair" if value >= fair else "poor"


def _interval(agreement: Mapping[str, Any], shown: Callable[[float], str] = correlation) -> str:
    low, high = agreement.get("low"), agreement.get("high")
    return f" ({shown(low)} to {shown(high)})" if low is not None and high is not None else ""


def _rounded(share: float) -> str:
    return percent(share, 0)


def _split_half(agreement: Mapping[str, Any] | None) -> Verdict | None:
    if not agreement or agreement.get("pearson") is None:
        return None
    value = agreement["pearson"]
    grade = _graded(value, 0.95, 0.8)
    sentence = {
        "good": "Factors from two disjoint halves of the fit give the same scores: enough "
        "sequences went into the fit.",
        "fair": "Factors from two disjoint halves of the fit give similar scores: the order near "
        "the top holds, neighbouring ranks may swap.",
        "poor": "Factors from two disjoint halves of the fit disagree: fit on more sequences "
        "before trusting the ranks.",
    }[grade]
    return Verdict(
        "Split-half agreement", f"r = {correlation(value)}{_interval(agreement)}", grade, sentence
    )


def _trace(layers: Mapping[str, Any] | None) -> Verdict | None:
    ratios = {
        name: layer["trace_ratio"]
        for name, layer in (layers or {}).items()
        if isinstance(layer, Mapping) and layer.get("trace_ratio") is not None
    }
    if not ratios:
        return None
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    error = abs(ratios[worst] - 1)
    grade = _graded(-error, -1e-3, -1e-2)
    sentence = {
        "good": "The eigenbasis keeps the norm of gradients in every layer, as it must.",
        "fair": f"The eigenbasis changes the norm of gradients slightly in {worst}.",
        "poor": f"The eigenbasis does not keep the norm of gradients in {worst}: scores "
        "through this layer are not to be trusted.",
    }[grade]
    return Verdict(
        "Gradients in the eigenbasis", f"off by at most {plain(error, 2)}", grade, sentence
    )


def _low_rank(rescore: Mapping[str, Any] | None, shared: bool) -> Verdict | None:
    rescore = rescore or {}
    names = ("pearson_control", "pearson_all", "pearson")  # the random control is the fair one
    value = next((rescore[name] for name in names if rescore.get(name) is not None), None)
    if value is None:
        return None
    grade = _graded(value, 0.99, 0.95)
    first = "stream.subspace (or leave it null), then " if shared else ""
    sentence = {
        "good": "Search with low-rank query gradients loses next to nothing; the scores shown are "
        "full-rank.",
        "fair": "Search with low-rank query gradients is close to full rank; a sequence near the "
        "cut may be missing. The scores shown are full-rank.",
        "poor": f"Search with low-rank query gradients differs from full rank: raise {first}"
        "query.rank. The scores shown are full-rank, but sequences may be missing.",
    }[grade]
    return Verdict("Low rank against full rank", f"r = {correlation(value)}", grade, sentence)


def _recall(recall: Mapping[str, Any]) -> Verdict | None:
    value = recall.get("recall")
    if value is None or recall.get("method") == "none":
        return None
    grade = _graded(value, 0.9, 0.7)
    sentence = {
        "good": "Of the most influential sequences, the filter lets nearly all through.",
        "fair": "The filter hides some of the most influential sequences: those shown are real, "
        "but others were never scored.",
        "poor": "The filter hides many of the most influential sequences: raise filter.top, or "
        "score the whole corpus (filter.method: none).",
    }[grade]
    return Verdict(
        "Recall of the filter", f"{percent(value, 0)}{_interval(recall, _rounded)}", grade, sentence
    )


def _dampings(dampings: Mapping[str, Mapping[str, Any]] | None) -> Verdict | None:
    """How far the order of the candidates depends on λ, by the λ that changes it most."""
    if not dampings:
        return None
    orders = {method.split("@")[1]: each["spearman"] for method, each in dampings.items()}
    ratio = min(orders, key=orders.__getitem__)
    grade = _graded(orders[ratio], 0.9, 0.7)
    sentence = {
        "good": "The order of the sequences hardly depends on the damping λ.",
        "fair": "The order of the sequences depends somewhat on the damping λ, which is a choice.",
        "poor": "The order of the sequences depends on the damping λ, which is a choice: believe "
        "only what holds at several.",
    }[grade]
    tried = ", ".join(
        f"{plain(value, 2)} at λ = {ratio} · mean Λ" for ratio, value in orders.items()
    )
    return Verdict(
        "Order under another damping", f"ρ = {plain(orders[ratio], 2)}", grade,
        f"{sentence} Rank correlation with this run's: {tried}.",
    )  # fmt: skip


def _rivals(baselines: Mapping[str, Any] | None) -> Iterator[Verdict]:
    for key, name in _RIVALS.items():
        agreement = (baselines or {}).get(key) or {}
        value = agreement.get("spearman", agreement.get("pearson"))
        if value is None:
            continue
        how = "much the same order as" if value >= 0.8 else "an order related to that of"
        sentence = f"EK-FAC gives {how if value >= 0.3 else 'another order than'} {name}."
        yield Verdict(f"Against {name}", f"ρ = {plain(value, 2)}", "note", sentence)


def _expected(found: Mapping[str, Any] | None) -> Verdict | None:
    """How much of what the queries expect stands early, beside the same of other rankings."""
    if not found:
        return None
    ours = found["ekfac"]
    grade = _graded(ours["recall_10"], 0.9, 0.5)
    filtered = found["num_filtered"]
    rivals = ", ".join(
        f"{name} {percent(found[key]['recall_10'], 0)} ({plain(found[key]['mrr'], 2)})"
        for key, name in _RIVALS.items()
        if key in found
    )
    sentence = (
        f"Of {found['num_expected']} documents that {found['num_queries']} queries expect, "
        f"{filtered} were never scored: the filter kept them out. Recall at 100 is "
        f"{percent(ours['recall_100'], 0)}, MRR {plain(ours['mrr'], 2)}; means over queries. "
        f"Recall at 10 (MRR) of others: {rivals}."
    )
    return Verdict(
        "Expected documents found", f"{percent(ours['recall_10'], 0)} in the first 10", grade,
        sentence,
    )  # fmt: skip


def _ground_truth(benchmarks: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """What EK-FAC is worth where the true response can be had; it was not measured on this run."""
    if not benchmarks:
        return None
    found = [each["ekfac"]["pearson"] for each in benchmarks]
    each_told = ", ".join(
        f"{each['benchmark']} {correlation(each['ekfac']['pearson'])}{_interval(each['ekfac'])} "
        f"over {each['ekfac']['num_queries']} queries"
        for each in benchmarks
    )
    dots = ", ".join(correlation(each["gradient_dot"]["pearson"]) for each in benchmarks)
    sentence = (
        "Not measured on this model: on benchmarks small enough to know the true response (PBRF), "
        f"EK-FAC correlates with it so: {each_told}; gradient dot product: {dots}."
    )
    value = f"r = {correlation(min(found))} to {correlation(max(found))}"
    return Verdict("Against ground truth, on benchmarks", value, "note", sentence)
