"""What a run will cost, before it runs: its stages' work, memory, files and time, and what fits.

The figures are arithmetic over shapes (`influence.costs`, `tasks.stagecosts`); time is that
arithmetic at rates that a short probe of the run's own model found, or that a person gives.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import store
from tasks.hardware import described, this_machine
from tasks.measured import plan_folder
from tasks.params import RunParams, load_params
from tasks.workspace import ARTIFACTS

if TYPE_CHECKING:  # both import torch, which a plan that is stored already does not need
    from tasks.probe import Rates
    from tasks.stagecosts import Planned, Sizes, StageCost
    from tasks.textrates import TextRates

BASE = 800_000_000  # bytes of a stage's process where none was probed: torch, Prefect, DVC
PLAN, RATES = "plan.json", "rates.json"
FORM = 1  # of the files above; what is stored in another is made anew


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage's figures; bytes, seconds (None: not known), and fb a token of its passes."""

    stage: str
    tokens: float
    fb: float | None
    device: float
    host: float
    disk: float
    work: float
    seconds: float | None
    shards: int
    groups: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's figures.

    Attributes:
        run: its name.
        key: of all that the figures follow from.
        told: what they follow from, in sentences.
        stages: in their order.
        faults: why it cannot run, a sentence each, with the smallest change that would mend it.
        blocked: the stages that do not fit.
    """

    run: str
    key: str
    told: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    faults: tuple[str, ...]
    blocked: tuple[str, ...]


def plan_run(
    root: Path, run: str, fit: str, hardware: str | None = None, anew: bool = False
) -> Plan:
    """The plan of a run, stored as plans/<run>/plan.json if it is for this machine.

    Args:
        root: the checkout.
        run: its name.
        fit: the run whose fit it uses.
        hardware: of a machine that is not at hand; None: this one.
        anew: even if a plan is stored.

    Raises:
        ValueError: a run that cannot be sized, or hardware that is not told as it should be.
    """
    params = load_params(root, run)
    key = plan_key(root, run, fit, params)
    if hardware is None and not anew and (stored := fitting_plan(root, run, key)) is not None:
        return stored
    made = _made(root, run, fit, params, key, hardware)
    if hardware is None:
        content = {"form": FORM, **asdict(made)}
        store.write_json(plan_folder(root, run) / PLAN, content)
    return made


def stored_plan(root: Path, run: str, key: str | None = None) -> Plan | None:
    """The plan that was made last; None if there is none, or not one of `key`."""
    file = plan_folder(root, run) / PLAN
    if not file.is_file():
        return None
    found = store.read_json(file)
    if found.pop("form", None) != FORM or (key is not None and found["key"] != key):
        return None
    stages = tuple(StagePlan(**each) for each in found["stages"])
    lines = {name: tuple(found[name]) for name in ("told", "faults", "blocked")}
    return Plan(**{**found, **lines, "stages": stages})


def fitting_plan(root: Path, run: str, key: str) -> Plan | None:
    """The stored plan of `key`, if what it needs of the host is free now; else it is made anew."""
    stored = stored_plan(root, run, key)
    if stored is None or stored.blocked:
        return None
    here = this_machine(root, "cpu")
    return stored if max(each.host for each in stored.stages) <= here.host_memory else None


def plan_key(root: Path, run: str, fit: str, params: RunParams) -> str:
    """sha256 of what a plan follows from: params, model, size of the corpus, queries, machine."""
    corpus, queries = root / params.corpus.path, root / params.query.path
    files = sorted(corpus.rglob("*")) if corpus.is_dir() else [corpus]
    seen = [[file.name, file.stat().st_size] for file in files if file.is_file()]
    told = {
        "params": params.model_dump(mode="json"),
        "files": {
            name: store.digest(file)
            for name, file in {
                "queries": queries,
                "model": root / ARTIFACTS / fit / "train/model.json",
                "corpus": root / ARTIFACTS / fit / "tokenize/summary.json",
            }.items()
            if file.is_file()
        },
        "corpus": seen,
        "machine": [platform.node(), platform.machine()],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _made(
    root: Path, run: str, fit: str, params: RunParams, key: str, hardware: str | None
) -> Plan:
    from tasks.attributed import resolve_device
    from tasks.remedies import refusal
    from tasks.stagecosts import Planned, stage_costs
    from tasks.stageseconds import reckoned, timed

    device = resolve_device(params.runtime.device)
    here = this_machine(root, device)
    sizes, tokenizer = run_sizes(root, params, root / ARTIFACTS / fit)
    told = [
        f"model: {sizes.model.shape.num_parameters:,} parameters",
        f"corpus: {sizes.corpus.num_sequences:,} sequences, {sizes.corpus.num_tokens:,} tokens "
        f"({sizes.corpus.told})",
    ]
    if hardware is not None:
        planned = Planned(params, sizes, described(hardware, here))
        stages = stage_costs(planned)
        seconds = reckoned(planned, stages)
        told.append(f"time: by arithmetic, on {hardware}")
    else:
        planned = Planned(params, sizes, here)
        rates, text, how = _rates(root, run, planned, device, tokenizer)
        if rates is not None:
            planned = Planned(params, replace(sizes, base=rates.base), here)
        stages = stage_costs(planned)
        if rates is not None:
            stages = [_with_checks(each, rates) for each in stages]
            seconds = timed(planned, stages, rates, text)
        else:
            seconds = {}
        told.append(how)
    lines = tuple(_stage_plan(planned, each, seconds.get(each.stage)) for each in stages)
    faults, blocked = refusal(planned, root, run, fit)
    return Plan(run, key, tuple(told), lines, tuple(faults), tuple(blocked))


def _with_checks(cost: "StageCost", rates: "Rates") -> "StageCost":
    """Stage validate imports more than others do."""
    return replace(cost, host=cost.host + rates.checks_base) if cost.stage == "validate" else cost


def _stage_plan(planned: "Planned", cost: "StageCost", seconds: float | None) -> StagePlan:
    from influence.costs import training_flop

    one = cost.tokens * training_flop(planned.sizes.model.shape, planned.length)
    return StagePlan(
        cost.stage, cost.tokens, cost.flop / one if one and cost.flop else None, cost.device,
        cost.host, cost.disk, cost.work, seconds, cost.shards, cost.groups,
    )  # fmt: skip


def run_sizes(root: Path, params: RunParams, fitted: Path) -> tuple["Sizes", Any]:
    """Model, corpus and queries of a run, and the tokenizer, if one is at hand.

    Args:
        root: the checkout.
        params: of the run.
        fitted: artifacts/<fit>, whose stages need not be there.

    Raises:
        ValueError: no model or corpus to be sized.
    """
    from tasks.corpussize import CHARACTERS, corpus_size
    from tasks.models import load_tokenizer
    from tasks.modelsizes import model_sizes
    from tasks.querysets import check_queries
    from tasks.stagecosts import Sizes

    model = model_sizes(params, root, fitted / "train", params.tokenize.context)
    try:
        tokenizer = None if model.folder is None else load_tokenizer(model.folder)
    except (ValueError, OSError):  # a model of which only the configuration is here
        tokenizer = None
    records = check_queries(root / params.query.path)
    texts = [str(each.fields["prompt"]) + str(each.fields["completion"]) for each in records]
    contrasts = sum(each.fields.get("contrast") is not None for each in records)
    if tokenizer is None:
        lengths = [max(2, len(text) // CHARACTERS) for text in texts]
    else:
        lengths = [
            len(tokens) for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
    length = (1 + contrasts / len(texts)) * sum(lengths) / len(lengths) + params.tokenize.bos
    corpus = corpus_size(params, root, fitted / "tokenize", tokenizer)
    return Sizes(model, corpus, len(texts), length, BASE), tokenizer


def _rates(
    root: Path, run: str, planned: "Planned", device: str, tokenizer: Any
) -> tuple["Rates | None", "TextRates | None", str]:
    """Timed now, or read back; None with the reason if nothing could be timed."""
    from tasks.corpora import Corpus
    from tasks.probe import Rates, probe_rates, startup
    from tasks.textrates import TextRates, text_rates

    file, key = plan_folder(root, run) / RATES, _rates_key(planned, device)
    if file.is_file() and (stored := store.read_json(file)).get("key") == key:
        text = stored["text"] and TextRates(**stored["text"])
        return Rates(**stored["rates"]), text, stored["told"]
    corpus, text = Corpus.of(planned.params.corpus, root), None
    try:
        started = startup(planned.sizes.model.folder)
        if tokenizer is not None:
            text = text_rates(planned.params, corpus, tokenizer)
    except (ValueError, OSError) as error:
        return None, None, f"time: not known ({error}); give --hardware"
    try:
        rates, told = (
            probe_rates(planned, device, started),
            "time: by a probe of a few batches here",
        )
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        told = f"time: of passes not known ({str(error).splitlines()[0]}); give --hardware"
        rates = Rates(
            started["seconds"], int(started["bytes"]), started["checks_seconds"],
            int(started["checks_bytes"]),
        )  # fmt: skip
    content = {"key": key, "told": told, "rates": asdict(rates), "text": text and asdict(text)}
    store.write_json(file, content)
    return rates, text, told


def _rates_key(planned: "Planned", device: str) -> str:
    """sha256 of what the rates depend on: machine, model, batches, queries."""
    params, corpus = planned.params, planned.sizes.corpus
    told = [
        FORM, platform.node(), device, planned.sizes.model.shape.num_parameters,
        str(planned.sizes.model.folder), params.train.model_dump(mode="json"), params.layers,
        params.runtime.model_dump(mode="json"), params.tokenize.model_dump(mode="json"),
        params.query.rank, planned.methods, planned.sizes.num_queries,
        params.stream.model_dump(mode="json"), params.filter.method, params.score.top,
        round(corpus.length, -1),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
