"""The only door to DVC: what a stage depends on, whether it is up to date, what it wrote."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tasks.active import PIPELINE, owner, pipeline_of
from tasks.params import ACTIVE, Runtime
from tasks.workspace import ARTIFACTS, STAGES

OURS = {"artifacts", "flows", "influence", "params", "tasks"}  # deps that are no input files
# They say how fast or by whom, and never how: a killed stage may resume under others.
FREE_OF_PARTIALS = {"runner", "address", "workers", "gpus_per_task", "layer_memory"}


def input_fingerprint(root: Path, stage: str, run: str, runtime: Runtime) -> str:
    """sha256 of all that a stage's partial results depend on.

    That is what DVC sees (command, digests of code, inputs and upstream artefacts, tracked params)
    and the runtime settings that decide how the work is cut up and rounded.

    Raises:
        ValueError: if an input is missing, or DVC has no such stage.
    """
    with _stage(root, stage, run) as found:
        deps = {_path(root, dep): _value(root, found, dep) for dep in found.deps}
        seen: dict[str, Any] = {"cmd": found.cmd, "deps": deps}
    seen["runtime"] = runtime.model_dump(exclude=FREE_OF_PARTIALS)
    return sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()


def _value(root: Path, stage: Any, dependency: Any) -> Any:
    """The tracked values of a params file, or the digest of a file or folder."""
    from dvc.dependency.param import ParamsDependency

    if isinstance(dependency, ParamsDependency):
        return dependency.read_params()
    if not dependency.exists:
        raise ValueError(
            f"{stage.name} depends on {_path(root, dependency)}, which is not in {root}; run the "
            "stages before it (`python -m flows.pipeline RUN`), or mend dvc.yaml "
            "(`python -m flows deps --write`)"
        )
    return dependency.get_hash().value


def pending(root: Path, stage: str, run: str) -> list[str]:
    """Why a stage must run, in DVC's words; empty if it is up to date."""
    with _repo(root) as repo:
        found = repo.status(targets=[_target(root, stage, run)])
    return [reason for reasons in found.values() for entry in reasons for reason in _reasons(entry)]


def _reasons(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for what, places in entry.items():
        for place, how in places.items():
            yield f"{what}: {place} ({how if isinstance(how, str) else ', '.join(how)})"


def recorded_digests(root: Path, run: str, stages: Sequence[str]) -> dict[str, str]:
    """DVC's md5 of what stages read and wrote, as dvc.lock has it: `out.factors`, `in.<path>`.

    Code and params are left out (git and the params file have them), and stages that never ran.
    """
    digests = {}
    with _repo(root) as repo:
        for stage in stages:
            (found,) = repo.stage.collect(_target(root, stage, run))
            for dep in found.deps:
                path = _path(root, dep)
                if Path(path).parts[0] not in OURS and dep.hash_info:
                    digests[f"in.{path}"] = dep.hash_info.value
            if len(found.outs) == 1 and found.outs[0].hash_info:
                digests[f"out.{stage}"] = found.outs[0].hash_info.value
    return digests


def input_digests(root: Path, stage: str, run: str) -> dict[str, str]:
    """DVC's md5 of the input files of a stage as they are now: `in.<path>`."""
    with _stage(root, stage, run) as found:
        inputs = {_path(root, dep): dep for dep in found.deps}
        return {
            f"in.{path}": dep.get_hash().value
            for path, dep in inputs.items()
            if Path(path).parts[0] not in OURS
        }


@dataclass(frozen=True, slots=True)
class Out:
    """An output as dvc.lock has it; `digest` is DVC's md5."""

    stage: str
    path: str
    digest: str
    num_bytes: int


def recorded_outs(root: Path, run: str, stages: Sequence[str]) -> list[Out]:
    """What stages wrote, as dvc.lock has it; stages that never ran are left out."""
    with _repo(root) as repo:
        return [
            Out(stage, _path(root, out), out.hash_info.value, out.meta.size or 0)
            for stage in stages
            for found in repo.stage.collect(_target(root, stage, run))
            for out in found.outs
            if out.hash_info
        ]


def upstream(root: Path, stage: str, run: str) -> list[str]:
    """Stages of the run, or of its fit, whose artefacts a stage reads, by `dvc.yaml`.

    A checkpoint to train on may be the artefact of another run, which is none of these.
    """
    deps = [Path(dep) for dep in tracked_paths(root, stage, run)[0]]

    def read(folder: Path) -> bool:
        return any(dep.is_relative_to(folder) for dep in deps)

    return [each for each in STAGES if read(ARTIFACTS / owner(root, each, run) / each)]


def tracked_paths(root: Path, stage: str, run: str) -> tuple[list[str], list[str]]:
    """Deps and outs of a stage in `dvc.yaml`; a tracked key is `params/<run>.yaml:key`."""
    from dvc.dependency.param import ParamsDependency

    with _stage(root, stage, run) as found:
        deps = []
        for dep in found.deps:
            path = _path(root, dep)
            keys = dep.params if isinstance(dep, ParamsDependency) else []
            deps += [f"{path}:{key}" for key in keys] or [path]
        return deps, [_path(root, out) for out in found.outs]


def target(root: Path, stage: str, run: str) -> str:
    """What `dvc repro` is told at the root: `validation/dvc.yaml:validate@concrete`."""
    name, file = f"{stage}@{owner(root, stage, run)}", pipeline_of(root, run)
    return name if file == PIPELINE else f"{file.as_posix()}:{name}"


def _target(root: Path, stage: str, run: str) -> str:
    """With the file's path, or DVC would take the `dvc.yaml` of the current directory."""
    return f"{root / pipeline_of(root, run)}:{stage}@{owner(root, stage, run)}"


def _path(root: Path, entry: Any) -> str:
    """The path of a dep or out as `dvc.yaml` has it: DVC's own `str` depends on the directory."""
    path = Path(entry.fs_path)
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


@contextmanager
def _repo(root: Path) -> Iterator[Any]:
    from dvc.exceptions import NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    # Its one warning, that a killed process held a lock which it has taken back, says nothing here.
    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(str(root)) as repo:
            yield repo
    except NotDvcRepoError as error:
        raise ValueError(f"{root} is not a DVC repository; run `dvc init` there") from error
    except LockError as error:
        raise ValueError(f"DVC is at work in {root} already; wait for it to end") from error


@contextmanager
def _stage(root: Path, stage: str, run: str) -> Iterator[Any]:
    from dvc.stage.exceptions import StageNotFound

    with _repo(root) as repo:
        try:
            (found,) = repo.stage.collect(_target(root, stage, run))
        except StageNotFound as error:
            raise ValueError(
                f"dvc.yaml has no stage {stage}@{run}; is the run in {ACTIVE}? "
                f"`python -m flows activate {run}` puts it there"
            ) from error
        yield found
