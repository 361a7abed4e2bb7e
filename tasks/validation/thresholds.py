"""What was asked of the benchmarks before any of them ran, and what came out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.validation import labels, rules
from tasks.validation.rules import Json, Rule

PAPERS = ("concrete", "energy", "digits", "mnist")  # EK-FAC is asked for a high agreement there
WIDE = ("concrete", "energy", "mnist")  # some layer is at least 128 wide on both sides
TEXT = ("tinylm",)
RETRAINED = ("concrete", "digits", "tinylm")
IN_TIME = (*PAPERS, "fashion", "tinylm")  # all together within an hour
ORDERED = "gradient dot < diagonal < K-FAC < EK-FAC < ASTRA < exact, but for overlapping intervals"


@dataclass(frozen=True, slots=True)
class Asked:
    """A rule and who must meet it: the benchmarks `of`, or those that ran `where` it applies.

    `enough`: so many suffice; None: all must.
    """

    text: str
    rule: Rule
    of: tuple[str, ...] = ()
    where: Callable[[Json], bool] = lambda outcome: True
    enough: int | None = None


def _in_double(outcome: Json) -> bool:
    return outcome["dtype"] == "float64"


def _has_astra(outcome: Json) -> bool:
    return any(point["x"] <= rules.ITERATIONS for point in outcome["astra"])


ASKED = (
    Asked("exact Gauss–Newton with the PBRF at ε = 0.1/N, in float64: Pearson ≥ 0.99",
          rules.exact_at(0.1, 0.99), where=_in_double),
    Asked("the same at ε = 1/N: Pearson ≥ 0.95", rules.exact_at(1.0, 0.95), where=_in_double),
    Asked("halving ε halves the response within 5 %", rules.linear, where=_in_double),
    Asked("EK-FAC with the PBRF: Pearson ≥ 0.80", rules.at_least("ekfac", 0.80), PAPERS),
    Asked("EK-FAC above gradient dot by ≥ 0.10, the paired interval above 0",
          rules.above_dot, PAPERS),
    Asked("EK-FAC at most 0.05 below LiSSA at its deepest", rules.near_lissa, PAPERS),
    Asked("EK-FAC on text: Pearson ≥ 0.60", rules.at_least("ekfac", 0.60), TEXT),
    Asked("EK-FAC on text: above gradient dot, gradient cosine and BM25", rules.above_all, TEXT),
    Asked(f"ASTRA of ≤ {rules.ITERATIONS} iterations with exact Gauss–Newton: Pearson ≥ 0.97",
          rules.astra, where=_has_astra),
    Asked(f"{rules.QUERIES} queries on text, fitting included: ≥ 10 × faster than LiSSA of equal "
          "agreement", rules.whole_time, TEXT),
    Asked("each further query: ≥ 100 × faster", rules.query_time, TEXT),
    Asked(f"{ORDERED}, on ≥ 3 benchmarks", rules.ordered, enough=3),
    Asked(f"rank {rules.RANK} with full rank: Pearson ≥ 0.99", rules.low_rank, WIDE),
    Asked("datamodeling score of EK-FAC ≥ 0.20 and ≥ 2 × gradient dot, ASTRA above EK-FAC",
          rules.retrained, RETRAINED),
    Asked("≥ 80 % of the mislabelled in the top 20 % by EK-FAC self-influence",
          rules.mislabelled, ("digits",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One benchmark's answer: in words, and whether it meets what was asked."""

    benchmark: str
    told: str
    met: bool


@dataclass(frozen=True, slots=True)
class Threshold:
    """One line of the table: what was asked, who answered, and who has not run yet."""

    asked: str
    found: tuple[Finding, ...]
    missing: tuple[str, ...] = ()
    enough: int | None = None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or `open` while benchmarks that decide it have not run."""
        met = sum(each.met for each in self.found)
        if self.enough is not None:
            possible = met + len(self.missing)
            return "met" if met >= self.enough else "open" if possible >= self.enough else "missed"
        if met < len(self.found):
            return "missed"
        return "open" if self.missing or not self.found else "met"


def judge(outcomes: Sequence[Json]) -> list[Threshold]:
    """Every threshold, in the order they were set down; `quick` proves nothing and is left out."""
    ran = {each["benchmark"]: each for each in outcomes if each["benchmark"] != "quick"}
    return [*(_judged(asked, ran) for asked in ASKED), _duration(ran)]


def _judged(asked: Asked, ran: Mapping[str, Json]) -> Threshold:
    """A benchmark that ran and lacks a number that was asked for does not meet it."""
    wanted = asked.of or tuple(name for name in ran if asked.where(ran[name]))
    found = []
    for name in labels.in_order(name for name in wanted if name in ran):
        answer = asked.rule(ran[name])
        found.append(Finding(name, *(answer or ("no number", False))))
    some = labels.BENCHMARKS[:-1] if asked.enough else wanted
    missing = tuple(name for name in some if name not in ran)
    return Threshold(asked.text, tuple(found), missing, asked.enough)


def _duration(outcomes: Mapping[str, Json]) -> Threshold:
    ran = [name for name in IN_TIME if name in outcomes]
    minutes = sum(outcomes[name]["seconds"] for name in ran) / 60
    found = (Finding("all", f"{minutes:.0f} min", minutes <= 60),) if ran else ()
    missing = tuple(name for name in IN_TIME if name not in outcomes)
    return Threshold("all benchmarks but cifar10: ≤ 60 min on two cores", found, missing)
