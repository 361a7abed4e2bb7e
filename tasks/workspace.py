"""Where a stage's work lies: the context that every stage is given, and its folders.

Work in progress is in `.work/<run>-<stage>-<fingerprint>/`, outside of what DVC removes before it
runs a stage; the finished `out` folder becomes `artifacts/<run>/<stage>/` by one rename.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tasks.params import RunParams, Runtime
from tasks.store import StorageError

STAGES = (
    "train",
    "tokenize",
    "filter",
    "factors",
    "eigen",
    "correct",
    "query",
    "stream",
    "score",
    "validate",
    "report",
)
# What depends on model and corpus alone: runs that agree on these share one fit.
FIT_STAGES = ("train", "tokenize", "factors", "eigen", "correct")
WORK = Path(".work")
ARTIFACTS = Path("artifacts")
EXPERIMENTS = Path(".dvc/tmp/exps")


class HasRuntime(Protocol):
    """The params of a run or of a benchmark, as far as they say where and how fast it works."""

    @property
    def runtime(self) -> Runtime:
        """The section `runtime`."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What every stage is told, of a run or of a benchmark.

    Attributes:
        run: name of the run or benchmark.
        stage: name of the stage.
        params: the checked params.
        root: the checkout, where `dvc.yaml` is.
        fingerprint: sha256 of all that the stage's result depends on.
        tags: where this execution comes from, for MLflow: Prefect ids, DVC experiment.
    """

    run: str
    stage: str
    params: HasRuntime
    root: Path
    fingerprint: str
    tags: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def module(self) -> str:
        """Where the code of the stage is: its `run` is given this context."""
        return f"tasks.{self.stage}"

    @property
    def work(self) -> Path:
        """Partial results; kept when the stage is killed, removed when it is done."""
        return self.root / WORK / f"{self.run}-{self.stage}-{self.fingerprint[:12]}"

    @property
    def out(self) -> Path:
        """What the stage writes; empty when it starts, artifacts/<run>/<stage> when it is done."""
        return self.work / "out"

    @property
    def published(self) -> Path:
        """Where `out` goes."""
        return self.root / ARTIFACTS / self.run / self.stage

    @property
    def elsewhere(self) -> Mapping[str, Path]:
        """Files of `out` that go to a place of their own: where to, by name."""
        return {}

    def input(self, path: str) -> Path:
        """The place of a path in the params file, which starts at the project's root."""
        return self.root / path


@dataclass(frozen=True, slots=True)
class StageContext(Context):
    """All that a stage of a run is told.

    Attributes:
        params: those of `params/<run>.yaml`; a stage reads the sections that `dvc.yaml` tracks.
        fit: the run whose fit this one uses; None: its own.
        reads: stages whose artefacts `dvc.yaml` lists among the deps; None: not checked.
    """

    params: RunParams
    fit: str | None = None
    reads: tuple[str, ...] | None = None

    def artifact(self, stage: str) -> Path:
        """The folder that an earlier stage of this run, or of the run whose fit it uses, wrote.

        Raises:
            ValueError: if `dvc.yaml` does not list it, or that stage has not run.
        """
        if self.reads is not None and stage not in self.reads:
            raise ValueError(
                f"stage {self.stage} reads the artefact of {stage}, but dvc.yaml does not list it "
                f"among its deps; add artifacts/${{key}}/{stage} there"
            )
        run = self.fit or self.run if stage in FIT_STAGES else self.run
        folder = self.root / ARTIFACTS / run / stage
        if not folder.is_dir():
            raise ValueError(
                f"{folder} does not exist: stage {stage} of run {run} has not run; "
                f"run `python -m flows.pipeline {self.run} --until {self.stage}`"
            )
        return folder


def find_root(start: Path) -> Path:
    """The nearest folder with a `dvc.yaml`, from `start` upwards.

    Never the place of this file: under `dvc exp run --temp`, the checkout is another. The
    `dvc.yaml` of the benchmarks, in a folder beside the root's own, is passed over.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "dvc.yaml").is_file() and not (folder.parent / "dvc.yaml").is_file():
            return folder
    raise ValueError(f"no dvc.yaml in {start} or above it; change to the project's folder")


def outer_root(root: Path) -> Path:
    """The user's checkout, also from a temporary one that `dvc exp run --temp` made inside it."""
    for folder in root.parents:
        if (folder / EXPERIMENTS) in (root, *root.parents):
            return folder
    return root


def prepare(context: Context) -> None:
    """Make the stage's folders: earlier partial results stay, an earlier `out` goes."""
    try:
        shutil.rmtree(context.out, ignore_errors=True)
        context.out.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            error.errno,
            f"cannot write {context.out}: {error.strerror}; make the folder writable, or free "
            "some space, and run again",
        ) from error


def publish(context: Context) -> None:
    """Make `out` the stage's artefact by one rename, and remove the partial results."""
    target = context.published
    if not any(context.out.iterdir()):
        raise ValueError(f"stage {context.stage} wrote nothing to {context.out}")
    if missing := [name for name in context.elsewhere if not (context.out / name).is_file()]:
        raise ValueError(f"stage {context.stage} wrote no {', '.join(missing)} to {context.out}")
    try:
        for name, place in context.elsewhere.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            (context.out / name).replace(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        context.out.rename(target)
    except OSError as error:
        raise StorageError(
            error.errno,
            f"cannot make {target}: {error.strerror}; the finished work is in {context.out}",
        ) from error
    shutil.rmtree(context.work, ignore_errors=True)
