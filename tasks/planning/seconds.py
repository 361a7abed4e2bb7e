"""How long each stage will take: timed rates, or the figures of a machine that is not at hand."""

from collections.abc import Mapping, Sequence

from influence import costs
from tasks.origin import Checkpoint
from tasks.planning.planned import Planned, StageCost
from tasks.planning.rates import Rates, TextRates
from tasks.runners import num_cores

TASK = 0.15  # seconds that Prefect takes for a shard, measured: submitted, awaited, remembered


def timed(
    planned: Planned, stages: Sequence[StageCost], rates: Rates, text: TextRates | None
) -> dict[str, float | None]:
    """Seconds by stage, from what was timed here; None where nothing tells them."""
    by_name = {each.stage: each for each in stages}
    working = _working(planned, by_name, rates, text)
    found: dict[str, float | None] = {}
    for name, seconds in working.items():
        if seconds is None:
            found[name] = None
            continue
        loaded = rates.load if by_name[name].tokens and name not in ("tokenize", "filter") else 0.0
        checks = rates.checks if name == "validate" else 0.0
        started = rates.start + TASK * by_name[name].shards
        found[name] = started + loaded + checks + seconds
    return found


def _working(
    planned: Planned,
    by_name: Mapping[str, StageCost],
    rates: Rates,
    text: TextRates | None,
) -> dict[str, float | None]:
    """Seconds of the work alone."""
    corpus, num_queries = planned.sizes.corpus, planned.sizes.num_queries
    found: dict[str, float | None] = {
        "train": _training(planned, by_name["train"], rates),
        "tokenize": None if text is None else text.tokenize * corpus.num_documents,
        "filter": None if text is None else text.filter * corpus.num_tokens,
        "report": 0.0,
    }
    for name in ("factors", "correct", "stream", "score"):
        found[name] = _passed(by_name[name], rates)
    eigen, asked = rates.eigen, rates.by_query
    found["eigen"] = None if eigen is None else by_name["eigen"].flop * eigen
    found["query"] = None if asked is None else num_queries * asked
    if asked is not None and found["score"] is not None:
        found["score"] += num_queries * asked  # at full rank, once more
    if rates.by_token is None or eigen is None or asked is None:
        found["validate"] = None
    else:
        settings = planned.params.validate_
        half = min(settings.split_half, corpus.num_sequences // 2)
        again = by_name["validate"].again / rates.flops if rates.flops else 0.0
        fit = half * (rates.by_token["factors"] + rates.by_token["correct"])
        sample = min(settings.sample, planned.num_candidates) * rates.by_token["stream"]
        found["validate"] = 2 * (planned.length * (fit + sample) + num_queries * asked)
        found["validate"] += 2 * by_name["eigen"].flop * eigen + again
    order = list(by_name)
    return dict(sorted(found.items(), key=lambda each: order.index(each[0])))


def _passed(cost: StageCost, rates: Rates) -> float | None:
    if rates.flops is None or rates.by_token is None:
        return None
    # A further pass for other layers does none of the work with these again.
    return cost.tokens / cost.groups * rates.by_token[cost.stage] + cost.again / rates.flops


def _training(planned: Planned, cost: StageCost, rates: Rates) -> float | None:
    if isinstance(planned.params.train, Checkpoint):
        return 0.0
    # One process has all cores; the probe's worker had its share of them.
    shared = min(planned.params.runtime.workers, num_cores())
    return None if rates.fb is None else cost.tokens * rates.fb / shared


def reckoned(planned: Planned, stages: Sequence[StageCost]) -> dict[str, float | None]:
    """Seconds by stage on described hardware: products at its rate, files written and read once.

    Text and pages are left out: what they take there, nobody has told.
    """
    found: dict[str, float | None] = {}
    hardware = planned.hardware
    for each in stages:
        speed = hardware.host_flops if each.stage == "eigen" else hardware.flops
        if not each.flop or speed is None:
            found[each.stage] = None
            continue
        devices = 1 if each.stage in ("eigen", "train") else min(hardware.devices, each.shards)
        seconds = each.flop / speed / devices
        if each.stage == "validate":  # its decompositions are the host's, in float64
            eigen = 2 * sum(map(costs.eigen_flop, costs.sides(planned.layers)))
            on_host = eigen / hardware.host_flops if hardware.host_flops else 0.0
            seconds = (each.flop - eigen) / speed / devices + on_host
        if hardware.disk_speed is not None:
            seconds += (2 * each.work + each.disk + planned.weights) / hardware.disk_speed
        found[each.stage] = seconds
    return found
