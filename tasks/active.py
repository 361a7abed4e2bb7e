"""`params/active.yaml`: which runs and benchmarks DVC has stages for, and their input files.

DVC cannot look into `params/<run>.yaml` for the paths of a stage's inputs, so they are told twice:
`activate` writes them, and `check_active` refuses to start a stage where the two disagree. Runs
that agree on model, corpus and fit share one: the curvature is fitted once, for any query set.
"""

from pathlib import Path
from typing import Any

from tasks import store
from tasks.faraway import is_far, record_of, write_record
from tasks.origin import AdapterCheckpoint, Checkpoint, FineTuned, LocalCheckpoint, Scratch
from tasks.params import ACTIVE, RunParams, checked, load_params, params_file
from tasks.section import Section, Text
from tasks.workspace import FIT_STAGES
from tasks.yamlfile import read_editable, yaml_text

PIPELINE = Path("dvc.yaml")  # the stages of runs
VALIDATION = Path("validation/dvc.yaml")  # those of benchmarks
# What the stages of a fit read; runs that agree on these may share one.
FIT_SECTIONS = ("train", "corpus", "tokenize", "layers", "factors", "correct")


class FitEntry(Section):
    """The input files of one fit: an entry of `fits` in `params/active.yaml`."""

    model: Text
    corpus: Text


class RunEntry(Section):
    """An entry of `runs` in `params/active.yaml`."""

    queries: Text
    fit: Text  # the run whose fit this one uses: itself, or one with the same fit sections


class BenchmarkEntry(Section):
    """An entry of `benchmarks` in `params/active.yaml`."""

    data: Text


class Active(Section):
    """All of `params/active.yaml`."""

    fits: dict[str, FitEntry]
    runs: dict[str, RunEntry]
    benchmarks: dict[str, BenchmarkEntry]


def load_active(root: Path) -> Active:
    """The runs, fits and benchmarks that DVC has stages for, by name."""
    return checked(root, ACTIVE, Active)


def pipeline_of(root: Path, name: str) -> Path:
    """The `dvc.yaml` with the stages of a run or benchmark."""
    return VALIDATION if name in load_active(root).benchmarks else PIPELINE


def owner(root: Path, stage: str, run: str) -> str:
    """The run under whose name DVC has a stage of `run`: `factors@OWNER`."""
    entry = load_active(root).runs.get(run)
    return entry.fit if entry and stage in FIT_STAGES else run


def fit_entry(params: RunParams) -> FitEntry:
    """What DVC watches for a fit.

    A model to train, or from the hub, is no file here: its stage then watches the corpus.
    """
    corpus = _watched(params.corpus.path)
    return FitEntry(model=checkpoint_path(params) or corpus, corpus=corpus)


def _watched(path: str) -> str:
    """The file or folder that DVC watches for a corpus: of a far one, its description."""
    return record_of(path).as_posix() if is_far(path) else path


def fit_differences(one: RunParams, other: RunParams) -> list[str]:
    """The sections by which two runs cannot share a fit."""
    return [name for name in FIT_SECTIONS if getattr(one, name) != getattr(other, name)]


def checkpoint_path(params: RunParams) -> str | None:
    """The folder of the checkpoint that a run takes, as it is or to train it on; None if the model
    is trained from scratch, or comes from the hub.

    Of an adapter, its own: that of the base is in model.json.
    """
    if isinstance(params.train, Scratch):
        return None
    if isinstance(params.train, FineTuned):
        return params.train.finetune.path
    checkpoint = params.train.checkpoint
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.adapter
    return checkpoint.path if isinstance(checkpoint, LocalCheckpoint) else None


def check_active(root: Path, run: str, params: RunParams) -> str:
    """That `params/active.yaml` says of `run` what its params file says; the run of its fit.

    Raises:
        ValueError: with the command that repairs it.
    """
    active, repair = load_active(root), f"run `python -m flows activate {run}`"
    told = active.runs.get(run)
    if told is None:
        raise ValueError(
            f"{ACTIVE}: run {run!r} is not there, so DVC has no stages for it; {repair}"
        )
    if told.fit != run and (other := fit_differences(params, load_params(root, told.fit))):
        raise ValueError(
            f"{ACTIVE}: `runs.{run}.fit` is {told.fit!r}, but {params_file(run)} and "
            f"{params_file(told.fit)} differ in {', '.join(other)}; {repair}"
        )
    places = {f"runs.{run}.queries": (told.queries, params.query.path)}
    fit = active.fits.get(told.fit)
    for key, value in fit_entry(params).model_dump().items():
        places[f"fits.{told.fit}.{key}"] = (getattr(fit, key, "nothing"), value)
    for key, (given, value) in places.items():
        if given != value:
            raise ValueError(
                f"{ACTIVE}: `{key}`: given {given!r}, but {params_file(run)} has {value!r}; "
                f"{repair}"
            )
    return told.fit


def check_inputs(root: Path, run: str, params: RunParams) -> None:
    """That the files which the params name exist.

    Raises:
        ValueError: naming the key, the path and what should be there.
    """
    places = {"query.path": params.query.path}
    if not is_far(params.corpus.path):
        places = {"corpus.path": params.corpus.path, **places}
    elif not (root / record_of(params.corpus.path)).is_file():
        raise ValueError(
            f"{params_file(run)}: `corpus.path`: {params.corpus.path} is not described in "
            f"{record_of(params.corpus.path)}; run `python -m flows activate {run}`"
        )
    if isinstance(params.train, FineTuned):
        places["train.finetune.path"] = params.train.finetune.path
    elif isinstance(params.train, Checkpoint):
        places |= {
            f"train.checkpoint.{key}": path
            for key, path in params.train.checkpoint.model_dump().items()
            if key in ("path", "adapter", "base")
        }
    for key, path in places.items():
        if not (root / path).exists():
            raise ValueError(
                f"{params_file(run)}: `{key}`: given {path!r}, but {root / path} does not exist; "
                "correct the path (it starts at the project's root) or put the file there"
            )


def activate(root: Path, run: str) -> bool:
    """Write a run's entry into `params/active.yaml`; whether anything changed.

    A run that differs from an active one only in what comes after the fit uses that one's fit. The
    file's comments stay. The run's params file is checked first, with its inputs.
    """
    params = load_params(root, run)
    if is_far(params.corpus.path):
        write_record(root, params.corpus.path)
    check_inputs(root, run, params)
    content, active = read_editable(root / ACTIVE), load_active(root)
    fit = _fit_to_use(root, run, params, active)
    content["fits"][fit] = fit_entry(params).model_dump()
    content["runs"][run] = RunEntry(queries=params.query.path, fit=fit).model_dump()
    return write_active(root, content)


def deactivate(root: Path, run: str) -> bool:
    """Take a run out of `params/active.yaml`; whether it was there. Its artefacts stay.

    Raises:
        ValueError: if another run uses its fit.
    """
    users = [name for name, entry in load_active(root).runs.items() if entry.fit == run != name]
    if users:
        raise ValueError(
            f"{ACTIVE}: {', '.join(users)} uses the fit of {run!r}; "
            f"deactivate {', '.join(users)} first"
        )
    content = read_editable(root / ACTIVE)
    content["runs"].pop(run, None)
    return write_active(root, content)


def _fit_to_use(root: Path, run: str, params: RunParams, active: Active) -> str:
    """The run's own fit if it has one, else that of a run which agrees, the present one first."""
    told = active.runs.get(run)
    if told and told.fit == run:
        return run
    owners = [name for name, entry in active.runs.items() if entry.fit == name]
    owners.sort(key=lambda name: not told or name != told.fit)
    files = [name for name in owners if (root / params_file(name)).is_file()]
    return next((n for n in files if not fit_differences(params, load_params(root, n))), run)


def write_active(root: Path, content: Any) -> bool:
    """Write the file if it says anything new; fits that no run uses go."""
    used = {entry["fit"] for entry in content["runs"].values()}
    for name in set(content["fits"]) - used:
        del content["fits"][name]
    text = yaml_text(content)
    if text == (root / ACTIVE).read_text(encoding="utf-8"):
        return False
    store.write_text(root / ACTIVE, text)
    return True
