"""What may be asked of one benchmark: a rule reads its outcome, and says what it met.

Outcomes are read as their JSON says them, `Outcome.as_json`. A rule gives the answer in words and
whether it meets what was asked; None where the outcome holds no such number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tasks.validation import labels

Json = Mapping[str, Any]
Answer = tuple[str, bool]
Rule = Callable[[Json], Answer | None]
ORDER = ("gradient_dot", "diagonal", "kfac", "ekfac", "astra", "exact")
QUERIES = 10  # that the comparison of times is for
ITERATIONS = 200  # of ASTRA, at most
RANK = 32


def _pearson(outcome: Json, name: str) -> float | None:
    method = outcome["methods"].get(name)
    return method["truth"]["pearson"] if method and method["truth"] else None


def exact_at(epsilon: float, bound: float) -> Rule:
    """Exact Gauss-Newton with the PBRF at this weight of z, in copies times 1/N."""

    def rule(outcome: Json) -> Answer | None:
        for each in outcome["truth"]:
            if math.isclose(each["epsilon"], epsilon):
                pearson = each["exact"]["pearson"]
                return f"{pearson:.4f}", pearson >= bound
        return None

    return rule


def linear(outcome: Json) -> Answer | None:
    """The response per copy at the second smallest ε against that at the smallest."""
    weights = sorted(outcome["truth"], key=lambda each: each["epsilon"])
    if len(weights) < 2:
        return None
    first, second = weights[:2]
    weights_told = f"from {first['epsilon']:g}/N to {second['epsilon']:g}/N"
    return f"{labels.percent(second['linearity'], 1)} {weights_told}", second["linearity"] <= 0.05


def at_least(name: str, bound: float) -> Rule:
    """A method's mean Pearson with the PBRF."""

    def rule(outcome: Json) -> Answer | None:
        pearson = _pearson(outcome, name)
        return None if pearson is None else (f"{pearson:.3f}", pearson >= bound)

    return rule


def above_dot(outcome: Json) -> Answer | None:
    """EK-FAC minus gradient dot product, query by query."""
    above = outcome["methods"].get("ekfac", {}).get("above_dot")
    if above is None:
        return None
    mean, low, high = above
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", mean >= 0.10 and low > 0


def near_lissa(outcome: Json) -> Answer | None:
    """EK-FAC minus the deepest LiSSA that has a number."""
    ekfac, depths = _pearson(outcome, "ekfac"), _numbered(outcome["lissa"], "truth")
    if ekfac is None or not depths:
        return None
    deepest = depths[-1]
    behind = deepest["truth"]["pearson"] - ekfac
    return f"{-behind:+.3f} at depth {deepest['x']:g}", behind <= 0.05


def _numbered(points: Sequence[Json], which: str) -> list[Json]:
    """The points that have a number, in the order of x."""
    return sorted((each for each in points if each[which]), key=lambda each: each["x"])


def above_all(outcome: Json) -> Answer | None:
    """EK-FAC against what needs no curvature."""
    ekfac = _pearson(outcome, "ekfac")
    others = {name: _pearson(outcome, name) for name in ("gradient_dot", "cosine", "bm25")}
    if ekfac is None:
        return None
    told = ", ".join(
        f"{labels.method(name)} {'none' if pearson is None else f'{pearson:.3f}'}"
        for name, pearson in others.items()
    )
    met = all(pearson is not None and ekfac > pearson for pearson in others.values())
    return f"{ekfac:.3f} against {told}", met


def astra(outcome: Json) -> Answer | None:
    """ASTRA's last allowed iterations with exact Gauss-Newton."""
    points = [each for each in outcome["astra"] if each["x"] <= ITERATIONS]
    numbered = _numbered(points, "reference")
    if not numbered:
        return None
    last = numbered[-1]
    pearson = last["reference"]["pearson"]
    return f"{pearson:.3f} after {last['x']:g}", pearson >= 0.97


def equal_agreement(outcome: Json) -> tuple[float, str] | None:
    """Seconds of a LiSSA solve that agrees as EK-FAC does, between depths by log time, in words.

    If the deepest agrees less, its own time: LiSSA would need more.
    """
    ekfac, depths = _pearson(outcome, "ekfac"), _numbered(outcome["lissa"], "truth")
    if ekfac is None or not depths:
        return None
    before = None
    for each in depths:
        seconds, pearson = each["seconds"], each["truth"]["pearson"]
        if pearson >= ekfac:
            if before is None:
                return seconds, f"depth {each['x']:g}, the first tried"
            share = (ekfac - before["truth"]["pearson"]) / (pearson - before["truth"]["pearson"])
            between = before["seconds"] ** (1 - share) * seconds**share
            return between, f"between depths {before['x']:g} and {each['x']:g}"
        before = each
    return depths[-1]["seconds"], f"depth {depths[-1]['x']:g}, which agrees less"


def _times(outcome: Json) -> tuple[Json, Json, float, str] | None:
    """EK-FAC, LiSSA, and LiSSA's seconds a query at equal agreement, in words."""
    equal, methods = equal_agreement(outcome), outcome["methods"]
    if equal is None or "ekfac" not in methods or "lissa" not in methods:
        return None
    return methods["ekfac"], methods["lissa"], *equal


def whole_time(outcome: Json) -> Answer | None:
    """Seconds for the first queries, fitting included, of LiSSA over EK-FAC."""
    if (found := _times(outcome)) is None:
        return None
    ekfac, lissa, seconds, told = found
    slow = lissa["fit_seconds"] + QUERIES * seconds
    fast = ekfac["fit_seconds"] + QUERIES * ekfac["query_seconds"]
    return (
        f"{slow / max(fast, 1e-9):.1f} × ({slow:.3g} s ÷ {fast:.3g} s; {told})",
        slow >= 10 * fast,
    )


def query_time(outcome: Json) -> Answer | None:
    """Seconds for one query more, of LiSSA over EK-FAC."""
    if (found := _times(outcome)) is None:
        return None
    ekfac, _, slow, told = found
    fast = ekfac["query_seconds"]
    return (
        f"{slow / max(fast, 1e-9):.0f} × ({slow:.3g} s ÷ {fast:.3g} s; {told})",
        slow >= 100 * fast,
    )


def ordered(outcome: Json) -> Answer | None:
    """Broken where a method is below the one before it and their intervals do not overlap."""
    truths = {name: outcome["methods"].get(name, {}).get("truth") for name in ORDER}
    found = {name: truth for name, truth in truths.items() if truth}
    if missing := [labels.method(name) for name in ORDER if name not in found]:
        return f"no number of {', '.join(missing)}", False
    swapped = [
        (first, second)
        for first, second in pairwise(ORDER)
        if found[second]["pearson"] < found[first]["pearson"]
    ]
    broken = [(one, two) for one, two in swapped if found[two]["high"] < found[one]["low"]]
    told = ", ".join(
        f"{labels.method(two)} {'below' if (one, two) in broken else 'level with'} "
        f"{labels.method(one)}"
        for one, two in swapped
    )
    return told or "holds", not broken


def low_rank(outcome: Json) -> Answer | None:
    """Truncated query gradients with full ones."""
    for each in outcome["ranks"]:
        if each["x"] == RANK and each["reference"]:
            pearson = each["reference"]["pearson"]
            return f"{pearson:.4f}", pearson >= 0.99
    return None


def retrained(outcome: Json) -> Answer | None:
    """Linear datamodeling scores, with the ceiling that retraining noise leaves."""
    retrained = outcome["retrained"]
    scores = retrained["scores"] if retrained else {}
    if not {"ekfac", "gradient_dot", "astra"} <= set(scores):
        return None
    ekfac, dot, astra = (scores[name]["pearson"] for name in ("ekfac", "gradient_dot", "astra"))
    told = f"{ekfac:.3f}, dot {dot:.3f}, ASTRA {astra:.3f}, ceiling "
    met = ekfac >= 0.20 and ekfac >= 2 * dot and astra > ekfac
    return told + f"{retrained['ceiling']['pearson']:.3f}", met


def mislabelled(outcome: Json) -> Answer | None:
    """Share of the mislabelled in the top fifth."""
    found = (outcome["mislabelled"] or {"found": {}})["found"].get("ekfac", {})
    for share, part in found.items():
        if math.isclose(float(share), 0.2):
            return labels.percent(part), part >= 0.80
    return None
