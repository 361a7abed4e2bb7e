"""The figures of a plan: sizes of model, corpus and queries, and how fast work is here."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from influence.costs import num_weights, training_flop
from tasks import store
from tasks.corpora import Corpus
from tasks.models import Tokenizer, load_tokenizer
from tasks.origin import FineTuned
from tasks.params import RunParams, load_params
from tasks.planning.corpus import CHARACTERS, corpus_size
from tasks.planning.hardware import described, this_machine
from tasks.planning.measured import plan_folder
from tasks.planning.model import ModelSizes, model_sizes
from tasks.planning.plan import FORM, Plan, StagePlan
from tasks.planning.planned import Planned, Sizes, StageCost
from tasks.planning.probe import probe_rates
from tasks.planning.rates import Rates, TextRates, of_start, startup, text_rates
from tasks.planning.remedies import refusal
from tasks.planning.seconds import reckoned, timed
from tasks.planning.stages import stage_costs
from tasks.precision import SPREAD, resolve_device
from tasks.querylines import check_queries
from tasks.runners import num_cores
from tasks.workspace import ARTIFACTS

# Bytes of a stage's process where none was probed: torch, Prefect, DVC; and those with a model.
BARE, BASE = 330_000_000, 480_000_000
RATES = "rates.json"


def estimated(
    root: Path, run: str, fit: str, key: str, hardware: str | None, anew: bool, probe: bool
) -> Plan:
    """A plan made now; see `plan.plan_run`."""
    params = load_params(root, run)
    device = resolve_device(params.runtime.device)
    # Of a machine that is described, nothing is asked of the devices here: there may be none.
    here = this_machine(root, device if hardware is None else "cpu")
    sizes, tokenizer = run_sizes(root, params, root / ARTIFACTS / fit)
    told = [
        _told(sizes.model),
        f"corpus: {sizes.corpus.num_sequences:,} sequences, {sizes.corpus.num_tokens:,} tokens "
        f"({sizes.corpus.told})",
    ]
    if hardware is not None:
        there = described(hardware, here)
        planned = Planned(params, sizes, there.as_one() if device == SPREAD else there)
        stages = stage_costs(planned)
        seconds = reckoned(planned, stages)
        told.append(f"time: by arithmetic, on {hardware}")
    else:
        planned = Planned(params, sizes, here)
        rates, text, how = _rates(root, run, planned, device, tokenizer, anew, probe)
        if rates is not None:
            planned = Planned(params, replace(sizes, base=rates.base, bare=rates.bare), here)
        stages = stage_costs(planned)
        if rates is not None:
            stages = [_with_checks(each, rates) for each in stages]
            seconds = timed(planned, stages, rates, text)
        else:
            seconds = {}
        told.append(how)
    lines = tuple(_stage_plan(planned, each, seconds.get(each.stage)) for each in stages)
    faults, blocked = refusal(planned, root, run, fit)
    return Plan(run, key, tuple(told), lines, tuple(faults), tuple(blocked), probe)


def _told(model: ModelSizes) -> str:
    """The model in words."""
    shape, weights = model.shape, num_weights(model.shape.layers)
    beside = " with an adapter" if model.adapter else ""
    told = f"model{beside}: {shape.num_parameters:,} parameters"
    if shape.routed:
        told += f", of which a token meets {shape.num_multiplied:,.0f}"
    return f"{told}; attributed are {weights:,} in {len(shape.layers):,} layers"


def _with_checks(cost: StageCost, rates: Rates) -> StageCost:
    """Stage validate imports more than others do."""
    return replace(cost, host=cost.host + rates.checks_base) if cost.stage == "validate" else cost


def _stage_plan(planned: Planned, cost: StageCost, seconds: float | None) -> StagePlan:
    one = cost.tokens * training_flop(planned.sizes.model.shape, planned.length)
    return StagePlan(
        cost.stage, cost.tokens, cost.flop / one if one and cost.flop else None, cost.device,
        cost.host, cost.disk, cost.work, seconds, cost.shards, cost.groups,
    )  # fmt: skip


def run_sizes(root: Path, params: RunParams, fitted: Path) -> tuple[Sizes, "Tokenizer | None"]:
    """Model, corpus and queries of a run, and the tokenizer, if one is at hand.

    Args:
        root: the checkout.
        params: of the run.
        fitted: artifacts/<fit>, whose stages need not be there.

    Raises:
        ValueError: no model or corpus to be sized.
    """

    model = model_sizes(params, root, fitted / "train", params.tokenize.context)
    tokenizer = _tokenizer(params, model)
    records = check_queries(root / params.query.path)
    texts = [_words(each.fields) for each in records]
    contrasts = sum(each.fields.get("contrast") is not None for each in records)
    if tokenizer is None:
        lengths = [max(2, len(text) // CHARACTERS) for text in texts]
    else:
        lengths = [
            len(tokens) for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
    length = (1 + contrasts / len(texts)) * sum(lengths) / len(lengths) + params.tokenize.bos
    corpus = corpus_size(params, root, fitted / "tokenize", tokenizer)
    return Sizes(model, corpus, len(texts), length, BARE, BASE), tokenizer


def _tokenizer(params: RunParams, model: ModelSizes) -> "Tokenizer | None":
    """The one that the stages will use, if it is at hand."""
    try:
        tokenizer = None if model.folder is None else load_tokenizer(model.folder)
    except (ValueError, OSError):  # a model of which only the configuration is here
        return None
    tuning = params.train.finetune if isinstance(params.train, FineTuned) else None
    if tokenizer is not None and tuning is not None and tuning.chat_template is not None:
        tokenizer.chat_template = tuning.chat_template
    return tokenizer


def _words(query: Mapping[str, Any]) -> str:
    """About the text of a query: of a conversation, what is said in it."""
    said = "".join(str(each["content"]) for each in query.get("messages") or ())
    return f"{said}{query.get('prompt') or ''}{query.get('completion') or ''}"


def _rates(
    root: Path,
    run: str,
    planned: Planned,
    device: str,
    tokenizer: "Tokenizer | None",
    anew: bool,
    probe: bool,
) -> tuple[Rates | None, TextRates | None, str]:
    """Timed now, or read back; None with the reason if nothing could be timed."""

    file, key = plan_folder(root, run) / RATES, _rates_key(planned, device)
    if not anew and file.is_file() and (stored := store.read_json(file)).get("key") == key:
        text = stored["text"] and TextRates(**stored["text"])
        return Rates(**stored["rates"]), text, stored["told"]
    if not probe:
        return None, None, f"time: not probed; `python -m flows plan {run}` does"
    corpus, text = Corpus.of(planned.params.corpus, root), None
    try:
        started = startup(planned.params, planned.sizes.model)
        if tokenizer is not None:
            text = text_rates(planned.params, corpus, tokenizer)
    except (ValueError, OSError) as error:
        return None, None, f"time: not known ({error}); give --hardware"
    try:
        rates, told = probe_rates(planned, device, started), _probed()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        told = f"time: of passes not known ({str(error).splitlines()[0]}); give --hardware"
        rates = of_start(started)
    content = {"key": key, "told": told, "rates": asdict(rates), "text": text and asdict(text)}
    store.write_json(file, content)
    return rates, text, told


def _probed() -> str:
    busy = os.getloadavg()[0] > num_cores()
    told = "time: by a probe of a few batches here"
    return f"{told}, while other work was on the machine (--anew: again)" if busy else told


def _rates_key(planned: Planned, device: str) -> str:
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
