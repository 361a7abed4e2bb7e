"""Methods and benchmarks as tables and figures name and order them."""

from collections.abc import Iterable

METHODS = {
    "gradient_dot": "gradient dot",
    "cosine": "gradient cosine",
    "diagonal": "diagonal Fisher",
    "kfac": "K-FAC",
    "ekfac": "EK-FAC",
    "lissa": "LiSSA",
    "astra": "ASTRA",
    "exact": "exact Gauss–Newton",
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "hidden_cosine": "hidden-state cosine",
}
BENCHMARKS = ("concrete", "energy", "digits", "mnist", "fashion", "cifar10", "tinylm", "quick")


def method(name: str) -> str:
    """The label of a method; of one that has none, its name."""
    return "PBRF" if name == "pbrf" else METHODS.get(name, name)


def in_order(benchmarks: Iterable[str]) -> list[str]:
    """The paper's order, then others by name."""
    known = {name: place for place, name in enumerate(BENCHMARKS)}
    return sorted(benchmarks, key=lambda name: (known.get(name, len(known)), name))


def percent(share: float, digits: int = 0) -> str:
    """`63.5 %`."""
    return f"{100 * share:.{digits}f} %"
