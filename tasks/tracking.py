"""The only door to MLflow: it listens, and nothing is read back.

The store is one SQLite file at the root of the user's checkout, also for an experiment that DVC
runs in a temporary one; no server is needed to log, only to look.
"""

import logging
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tasks import dvcstage
from tasks.workspace import STAGES, StageContext, outer_root

EXPERIMENT = "influence"
BATCH = 100  # params or tags that MLflow takes at once
LONGEST = 500  # characters of a param or tag
NOISY = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent")


def log_validation(
    context: StageContext,
    metrics: Mapping[str, Any],
    params: Mapping[str, Any],
    figures: Mapping[str, Path],
    tables: Mapping[str, Path],
) -> str:
    """Log one execution of `validate`; the id of its MLflow run.

    Args:
        context: of the stage; its tags (Prefect ids, DVC experiment) become the run's.
        metrics: numbers by dotted name; what is no finite number is left out.
        params: values by dotted name.
        figures: picture files by name.
        tables: data files by name.
    """
    from mlflow import MlflowClient

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    client = MlflowClient(tracking_uri(context.root))
    tags = {**provenance(context), **context.tags}
    name = " ".join([context.run, *filter(None, [tags.get("dvc.exp")])])
    run = client.create_run(_experiment(client, context.root), run_name=name, tags=tags)
    try:
        _log_values(client, run.info.run_id, metrics, params)
        for folder, files in (("figures", figures), ("tables", tables)):
            for file in files.values():
                client.log_artifact(run.info.run_id, str(file), folder)
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id


def tracking_uri(root: Path) -> str:
    """Where MLflow's runs are: `MLFLOW_TRACKING_URI`, else mlflow.db in the user's checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outer_root(root) / 'mlflow.db'}"


def provenance(context: StageContext) -> dict[str, str]:
    """Tags that say what was measured: run, stage, git commit, digests of inputs and artefacts."""
    earlier = STAGES[: STAGES.index(context.stage)]
    digests = dvcstage.recorded_digests(context.root, context.run, earlier)
    commit = _git(context.root, "rev-parse", "HEAD")
    return {
        "run": context.run,
        "stage": context.stage,
        "fingerprint": context.fingerprint,
        "git.commit": commit or "none",
        "git.dirty": str(bool(_git(context.root, "status", "--porcelain"))).lower(),
        **{f"dvc.{name}": value for name, value in digests.items()},
    }


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where there is no repository or no commit."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _experiment(client: Any, root: Path) -> str:
    """The id of the experiment; its files lie beside the database."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    if "MLFLOW_TRACKING_URI" in os.environ:
        return client.create_experiment(EXPERIMENT)
    return client.create_experiment(EXPERIMENT, (outer_root(root) / "mlruns").as_uri())


def _log_values(
    client: Any, run_id: str, metrics: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """In batches: a call for each would take a second a hundred."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    measured = (Metric(key, float(v), now, 0) for key, v in metrics.items() if _is_number(v))
    given = (Param(key, str(v)[:LONGEST]) for key, v in params.items())
    for batch in _batches(measured):
        client.log_batch(run_id, metrics=batch)
    for batch in _batches(given):
        client.log_batch(run_id, params=batch)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _batches(values: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(islice(values, BATCH)):
        yield batch
