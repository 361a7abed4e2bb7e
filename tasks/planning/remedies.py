"""What does not fit, and the smallest change of the params that would: found by trying."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.params import RunParams, Tfidf, run_file
from tasks.planning.planned import Planned, StageCost
from tasks.planning.stages import stage_costs
from tasks.workspace import ARTIFACTS, FIT_STAGES, STAGES

DISK, DEVICE, HOST = "disk", "device memory", "host memory"


@dataclass(frozen=True, slots=True)
class Lack:
    """Of what too little is there, for which stage, in bytes."""

    what: str
    stage: str
    need: float
    there: int


def lacks(planned: Planned, done: frozenset[str] = frozenset()) -> list[Lack]:
    """What does not fit, the worst stage of each kind.

    Args:
        planned: the run.
        done: stages whose files are there already and take no further room.
    """
    stages = [each for each in stage_costs(planned) if each.stage not in done]
    hardware, found = planned.hardware, list[Lack]()
    if not stages:
        return found
    stage, most = fullest(stages)
    found.append(Lack(DISK, stage, most, hardware.disk))
    if hardware.device_memory is not None:
        worst = max(stages, key=lambda each: each.device)
        found.append(Lack(DEVICE, worst.stage, worst.device, hardware.device_memory))
    worst = max(stages, key=lambda each: each.host)
    found.append(Lack(HOST, worst.stage, worst.host, hardware.host_memory))
    return [each for each in found if each.need > each.there]


def fullest(stages: Sequence[StageCost]) -> tuple[str, float]:
    """The stage at which most is on the disk: all outputs so far, and its partial results."""
    kept, most, name = 0.0, 0.0, stages[0].stage
    for each in stages:
        kept += each.disk
        if kept + each.work > most:
            most, name = kept + each.work, each.stage
    return name, most


def refusal(planned: Planned, root: Path, run: str, fit: str) -> tuple[list[str], list[str]]:
    """Why the run cannot run, a sentence each, and the stages that do not fit; empty if it fits."""
    done = frozenset(
        stage
        for stage in STAGES
        if (root / ARTIFACTS / (fit if stage in FIT_STAGES else run) / stage).is_dir()
    )
    found = lacks(planned, done)
    if not found:
        return [], []
    told = [_sentence(each, run) for each in found]
    return [*told, _remedy(planned, done, run)], list(dict.fromkeys(each.stage for each in found))


def _sentence(lack: Lack, run: str) -> str:
    return (
        f"{run_file(run)}: stage {lack.stage} needs {gib(lack.need)} of {lack.what}, and "
        f"{gib(lack.there)} are free"
    )


def _remedy(planned: Planned, done: frozenset[str], run: str) -> str:
    change = smallest_change(planned, done)
    if change:
        told = " and ".join(f"{key}: {_told(value)}" for key, value in change.items())
        return f"{run_file(run)}: it would fit with {told}"
    extreme = _extreme(planned)
    what = ", ".join(
        f"{gib(each.need)} of {each.what} for {each.stage}" for each in lacks(extreme, done)
    )
    return (
        f"{run_file(run)}: no setting makes it fit; at the least it needs {what}: take a larger "
        "machine, a smaller model, or fewer `layers`"
    )


def smallest_change(planned: Planned, done: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The mildest settings that make a run fit: of one key if one suffices, else of several.

    Those that leave every result as it is are tried first, then those that change rounding, then
    those that change what is computed. Empty if nothing helps.
    """
    for key, values in settings(planned.params):
        if not values or lacks(changed(planned, {key: values[-1]}), done):
            continue  # not even the most of it would do
        for value in values:
            if not lacks(changed(planned, {key: value}), done):
                return {key: value}
    taken: dict[str, Any] = {}
    for key, values in settings(planned.params):
        if not values:
            continue
        left = _shortage(planned, taken | {key: values[-1]}, done)
        if not left:
            fits = (value for value in values if not _shortage(planned, taken | {key: value}, done))
            return _needed(planned, taken | {key: next(fits)}, done)
        if left < _shortage(planned, taken, done):
            taken |= {key: values[-1]}
    return {}


def _needed(planned: Planned, change: dict[str, Any], done: frozenset[str]) -> dict[str, Any]:
    """A change without the parts that it does not need."""
    for key in list(change):
        fewer = {name: value for name, value in change.items() if name != key}
        if fewer and not lacks(changed(planned, fewer), done):
            change = fewer
    return change


def _shortage(planned: Planned, change: dict[str, Any], done: frozenset[str]) -> float:
    return sum(each.need - each.there for each in lacks(changed(planned, change), done))


def settings(params: RunParams) -> list[tuple[str, list[Any]]]:
    """What may be changed, and to which values, the mildest first."""
    runtime, query, score = params.runtime, params.query, params.score
    memory = runtime.layer_memory if runtime.layer_memory != "auto" else 64.0
    tokens = runtime.tokens_per_batch
    context = params.tokenize.context
    largest = 65536 if tokens == "auto" else tokens
    found: list[tuple[str, list[Any]]] = [
        ("runtime.layer_memory", list(_halved(float(memory), 1 / 64))),
        ("runtime.tokens_per_batch", [int(each) for each in _halved(largest, context)]),
        ("runtime.workers", [int(each) for each in _halved(runtime.workers, 1)]),
        ("runtime.shards", [int(each) for each in _halved(runtime.shards, 1)]),
        ("runtime.dtype", {"float64": ["float32", "bfloat16"], "float32": ["bfloat16"]}.get(
            runtime.dtype, [])),
        ("query.damping_grid", [[]] if query.damping_grid else []),
        ("query.rank", [int(each) for each in _halved(query.rank or 1024, 1)]),
        ("stream.self_influence", [False] if params.stream.self_influence else []),
        ("score.top", [int(each) for each in _halved(score.top, params.report.top)]),
    ]  # fmt: skip
    if isinstance(params.filter, Tfidf):
        top = [int(each) for each in _halved(params.filter.top, 10)]
        found.append(("filter.top", top))
    found.append(("corpus.limit", _limits(params)))
    return found


def _limits(params: RunParams) -> list[int]:
    """Documents: of a corpus of unknown number, from a billion downwards."""
    return [int(each) for each in _halved(params.corpus.limit or 10**9, 1000)]


def _halved(start: float, least: float) -> Iterator[float]:
    value = start / 2
    while value > least:
        yield value
        value /= 2
    if start > least:
        yield least


def changed(planned: Planned, change: dict[str, Any]) -> Planned:
    """The run with settings by dotted key."""
    content = planned.params.model_dump(by_alias=True)
    for key, value in change.items():
        section, name = key.split(".")
        content[section][name] = value
    params, sizes = RunParams.model_validate(content), planned.sizes
    limit = change.get("corpus.limit")
    if limit is not None and limit < sizes.corpus.num_documents:
        share, corpus = limit / sizes.corpus.num_documents, sizes.corpus
        fewer = replace(
            corpus,
            num_documents=limit,
            num_sequences=max(1, round(share * corpus.num_sequences)),
            num_tokens=max(1, round(share * corpus.num_tokens)),
        )
        sizes = replace(sizes, corpus=fewer)
    return Planned(params, sizes, planned.hardware)


def _extreme(planned: Planned) -> Planned:
    """Everything at its least."""
    return changed(planned, {key: values[-1] for key, values in settings(planned.params) if values})


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def gib(num_bytes: float) -> str:
    """Bytes in GiB, three digits that count."""
    return f"{num_bytes / 2**30:,.3g} GiB"
