"""The door to MLflow: it listens, and nothing that is computed depends on it.

The store is one SQLite file at the root of the user's checkout, also for an experiment that DVC
runs in a temporary one; no server is needed to log, only to look. A store that cannot be reached
costs a line on the terminal, never a result.
"""

import json
import logging
import math
import os
import re
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from urllib.error import HTTPError

from tasks import store
from tasks.progress import say
from tasks.registry import Dataset, Factors, input_of, register
from tasks.workspace import outer_root

EXPERIMENT, BENCHMARKS = "influence", "benchmarks"
TOLD = {  # of each experiment, in the UI
    EXPERIMENT: "One run for each execution of `validate`.",
    BENCHMARKS: "One run for each execution of a benchmark, with a child for each method and seed.",
}
NOTE = "mlflow.note.content"
KIND = "custom_model_development"  # MLflow's word for what is no chat application
METRICS, PARAMS = 1000, 100  # that MLflow takes at once
LONGEST = 5000  # characters of a param or tag
PARENT = "mlflow.parentRunId"
NO_NAME = re.compile(r"[^/\w.\- ]")  # MLflow refuses other characters in names
WAIT = 5.0  # seconds for a sign of life from the store
BOUNDS = {  # of MLflow's patience with a server that fails; by itself it tries for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
NOISY = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent")
# By this tag a later stage finds the run of what it reads. No artefact can hold the id itself: two
# executions with equal results would then differ.
DIGEST = "digest.metrics"


Series = Mapping[str, Sequence[float] | Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Child:
    """A part of an execution that is to be compared with others, as a run below the entry's own.

    Attributes:
        name, tags, params, metrics: as an entry's.
        failed: why it has no result, in a sentence; None if it has.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, object]
    metrics: Mapping[str, object]
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One execution of a stage, as MLflow is to show it.

    Attributes:
        name: of the run; tells it from others in a legend.
        started: when the execution did, in seconds since the epoch.
        metrics_file: the file whose digest leads from the artefact to this run.
        tags: by dotted name; `run` and `stage` are among them.
        params: values by dotted name.
        metrics: numbers by name, `section/name`; what is no finite number is left out.
        series: numbers by name, one a step, from 0 or as the keys say.
        artifacts: files by folder.
        dataset: the corpus that was scored; None where its digest is not known.
        factors: the fitted curvature, by reference; None where its digest is not known.
        children: runs below this one.
        experiment: where the run goes.
        again: the command that computes and logs again; None: that of a run's stage.
    """

    name: str
    started: float
    metrics_file: Path
    tags: Mapping[str, str]
    params: Mapping[str, object]
    metrics: Mapping[str, object]
    series: Series = field(default_factory=dict)
    artifacts: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    dataset: Dataset | None = None
    factors: Factors | None = None
    children: Sequence[Child] = ()
    experiment: str = EXPERIMENT
    again: str | None = None


def record(root: Path, entry: Entry) -> str | None:
    """Log one execution; the id of its MLflow run, None if the store could not take it."""
    run, stage = entry.tags["run"], entry.tags["stage"]
    command = entry.again or f"dvc repro --force --single-item {stage}@{run} report@{run}"
    again = f"`{command}` computes and logs again"
    return _listening(root, f"{stage}@{run}", again, lambda client: _record(client, root, entry))


def attach(root: Path, run: str, metrics_file: Path, file: Path, folder: str) -> str | None:
    """Add a file to the newest MLflow run that logged these metrics; its id, None without one."""
    label = f"{folder}@{run}"

    def add(client: Any) -> str | None:
        found = _newest(client, identity(run, metrics_file))
        if found is None:
            say(unknown)
        else:
            client.log_artifact(found, str(file), folder)
        return found

    unknown = f"{label}: MLflow has no run of this validation; {file.name} is not added there"
    database = _database(tracking_uri(root))
    if database is not None and not database.exists():
        say(unknown)
        return None
    return _listening(root, label, f"`dvc repro --force --single-item {label}` tries again", add)


def logged_run(root: Path, run: str, metrics_file: Path) -> tuple[str, str] | None:
    """Ids of experiment and of the newest run that logged these metrics, for a link to it."""
    database = _database(tracking_uri(root))
    if database is not None and not database.exists():
        return None

    def find(client: Any) -> str | None:
        found = _newest(client, identity(run, metrics_file))
        return found and f"{client.get_run(found).info.experiment_id}/{found}"

    found = _listening(root, f"validate@{run}", "it is only not linked", find)
    return (found.split("/")[0], found.split("/")[1]) if found else None


def identity(run: str, metrics_file: Path) -> dict[str, str]:
    """The tags that lead from an artefact to its MLflow run."""
    return {"run": run, DIGEST: store.digest(metrics_file)}


def tracking_uri(root: Path) -> str:
    """Where MLflow's runs are: `MLFLOW_TRACKING_URI`, else mlflow.db in the user's checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outer_root(root) / 'mlflow.db'}"


def _listening(
    root: Path, label: str, remedy: str, work: Callable[[Any], str | None]
) -> str | None:
    """What `work` returns; None, and a line that says so, if the store fails in whatever way."""
    uri = tracking_uri(root)
    for name, value in BOUNDS.items():
        os.environ.setdefault(name, value)
    try:
        _knock(uri)
        from mlflow import MlflowClient

        for name in NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)
        return work(MlflowClient(uri))
    except Exception as error:  # whatever a database or a server may throw
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        told = f"not logged to MLflow ({uri}): {reason.splitlines()[0]}"
        say(f"{label}: WARNING: {_without_password(told)}")
        say(f"{label}: the result itself is complete; {remedy}")
        return None


def _knock(uri: str) -> None:
    """Fail at once where the store does not answer: MLflow itself would try for minutes."""
    if file := _database(uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=WAIT)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    elif uri.startswith(("http://", "https://")):
        with suppress(HTTPError):  # an answer is an answer
            place = _without_password(uri).rstrip("/")
            urllib.request.urlopen(f"{place}/health", timeout=WAIT).close()


def _database(uri: str) -> Path | None:
    """The file of an SQLite store."""
    found = re.fullmatch(r"sqlite:///([^?]+).*", uri)
    return Path(found.group(1)) if found else None


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _record(client: Any, root: Path, entry: Entry) -> str:
    tags = {**entry.tags, **identity(entry.tags["run"], entry.metrics_file)}
    start = int(entry.started * 1000)
    experiment = _experiment(client, root, entry.experiment)
    created = client.create_run(experiment, start, _tags(tags), entry.name)
    run_id = created.info.run_id
    try:
        _log_values(client, run_id, entry.params, entry.metrics, entry.series)
        if entry.dataset is not None:
            client.log_inputs(run_id, [input_of(entry.dataset)])
        for folder, files in entry.artifacts.items():
            for file in files:
                client.log_artifact(run_id, str(file), folder)
        if entry.factors is not None:
            client.set_tag(run_id, "factors", register(client, run_id, entry.factors))
        for place, child in enumerate(reversed(entry.children)):  # the UI has the newest on top
            tags = _tags({**child.tags, PARENT: run_id})
            below = client.create_run(experiment, start + place, tags, child.name).info.run_id
            _log_values(client, below, child.params, child.metrics, {})
            client.set_terminated(below, "FAILED" if child.failed else "FINISHED")
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_name(key): value[:LONGEST] for key, value in tags.items()}


def _experiment(client: Any, root: Path, name: str) -> str:
    """The id of the experiment; of a store in a file, the artifacts lie beside it."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    database = _database(tracking_uri(root))
    place = (database.resolve().parent / "mlruns").as_uri() if database else None
    tags = {NOTE: TOLD[name], "mlflow.experimentKind": KIND}
    return client.create_experiment(name, place, tags)


def _newest(client: Any, tags: Mapping[str, str]) -> str | None:
    known = [found for name in TOLD if (found := client.get_experiment_by_name(name))]
    if not known:
        return None
    wanted = " and ".join(
        ["attributes.status = 'FINISHED'", *(f"tags.`{key}` = '{tags[key]}'" for key in tags)]
    )
    newest = ["attributes.start_time DESC"]
    for run in client.search_runs([each.experiment_id for each in known], wanted, 1, 1, newest):
        return run.info.run_id
    return None


def _log_values(
    client: Any,
    run_id: str,
    params: Mapping[str, object],
    metrics: Mapping[str, object],
    series: Series,
) -> None:
    """In batches: a call for each would take a second a hundred."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    single = [(key, value, 0) for key, value in metrics.items()]
    points = [
        (key, value, step)
        for key, row in series.items()
        for step, value in (row.items() if isinstance(row, Mapping) else enumerate(row))
    ]
    logged = [
        Metric(_name(key), float(value), now, step)
        for key, value, step in single + points
        if _is_number(value)
    ]
    told = [Param(_name(key), _text(value)) for key, value in params.items()]
    for some in _batches(logged, METRICS):
        client.log_batch(run_id, metrics=some)
    for some in _batches(told, PARAMS):
        client.log_batch(run_id, params=some)


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _name(key: str) -> str:
    return NO_NAME.sub("_", key)[:250]


def _text(value: object) -> str:
    """As in the params file: null, true, ["mlp"]."""
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
