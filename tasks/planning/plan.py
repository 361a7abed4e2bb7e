"""What a run will cost, before it runs: its stages' work, memory, files and time, and what fits.

The figures are arithmetic over shapes (`influence.costs`, `tasks.planning.planned`); time is that
arithmetic at rates that a short probe of the run's own model found, or that a person gives.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks import store
from tasks.params import RunParams, load_params
from tasks.planning.hardware import this_machine
from tasks.planning.measured import plan_folder
from tasks.workspace import ARTIFACTS

PLAN = "plan.json"
FORM = 3  # of that file; what is stored in another is made anew


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
        probed: a probe was tried, though perhaps in vain.
    """

    run: str
    key: str
    told: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    faults: tuple[str, ...]
    blocked: tuple[str, ...]
    probed: bool


def plan_run(
    root: Path,
    run: str,
    fit: str,
    hardware: str | None = None,
    anew: bool = False,
    probe: bool = True,
) -> Plan:
    """The plan of a run, stored as plans/<run>/plan.json if it is for this machine.

    Args:
        root: the checkout.
        run: its name.
        fit: the run whose fit it uses.
        hardware: of a machine that is not at hand; None: this one.
        anew: even if a plan is stored.
        probe: time a few batches where that was not done before; else times stay unknown.

    Raises:
        ValueError: a run that cannot be sized, or hardware that is not told as it should be.
    """
    params = load_params(root, run)
    key = plan_key(root, run, fit, params)
    stored = fitting_plan(root, run, key) if hardware is None and not anew else None
    if stored and (stored.probed or not probe):
        return stored
    from tasks.planning.estimate import (
        estimated,  # torch, which a plan that is stored does not need
    )

    made = estimated(root, run, fit, key, hardware, anew, probe)
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
    [model] = params.train.model_dump().values()
    folders = {key: root / model[key] for key in ("path", "base", "adapter") if key in model}
    told = {
        "params": params.model_dump(mode="json"),
        "files": {
            name: store.digest(file)
            for name, file in {
                "queries": queries,
                "model": root / ARTIFACTS / fit / "train/model.json",
                "corpus": root / ARTIFACTS / fit / "tokenize/summary.json",
                **{key: folder / "config.json" for key, folder in folders.items()},
                "lora": folders.get("adapter", root) / "adapter_config.json",
            }.items()
            if file.is_file()
        },
        "corpus": seen,
        "machine": [platform.node(), platform.machine()],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
