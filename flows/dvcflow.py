"""The pipeline as a Prefect flow: one task a stage; DVC decides which stages run.

A stage that is up to date ends as `Cached`; another is run by `dvc repro`, in a process of its own,
with code and memory of its own. `dvc.lock` has one writer, whichever door was used.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentTaskRunId
from prefect.runtime import task_run
from prefect.states import Completed, Crashed, Failed

from flows import environment
from flows.processes import end_group, signal_at_parents_death
from tasks import dvcstage
from tasks.progress import duration, say
from tasks.workspace import STAGES, find_root

RESTORED = "is cached - skipping run"  # DVC's word for its run cache
CHATTER = (  # what DVC says of itself, every time
    "Running stage ",
    "> python -m flows.stage",
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "To enable auto staging",
    "Use `dvc push`",
    "git add",
    "dvc config core.autostage",
    "ERROR: failed to reproduce",
)


@flow(name="pipeline", flow_run_name="{run} until {until}", validate_parameters=False)
def pipeline(run: str, until: str) -> Any:
    """Bring every stage of a run up to `until` up to date."""
    root, states = find_root(Path.cwd()), dict[str, Any]()
    for stage in STAGES[: STAGES.index(until) + 1]:
        # Called, not submitted: only in the main thread does a cancel end the wait for the child.
        states[stage] = dvc_stage.with_options(name=stage, task_run_name=f"{stage}@{run}")(
            stage,
            run,
            wait_for=[states[name] for name in dvcstage.upstream(root, stage, run)],
            return_state=True,
        )
        if not states[stage].is_completed():
            return Failed(message=states[stage].message)
    return Completed(message=f"{run} is up to date until {until}")


@task(persist_result=False)
def dvc_stage(stage: str, run: str) -> Any:
    """Run one stage by DVC if DVC finds a reason to."""
    label, start = f"{stage}@{run}", time.monotonic()
    try:
        reasons = dvcstage.pending(find_root(Path.cwd()), stage, run)
    except ValueError as raised:
        return Failed(message=f"{label}: {raised}")
    if not reasons:
        tell(f"{label}: cached")
        return Completed(name="Cached", message="up to date")
    tell(f"{label}: runs ({reasons[0]}{', …' if len(reasons) > 1 else ''})")
    process = start_dvc(label)
    error, restored = "", False
    try:
        for line in lines_of(process):
            tell(line)
            restored = restored or RESTORED in line
            error = line if line.startswith((f"{label}: error:", "ERROR:")) else error
        process.wait()
    finally:
        end_group(process)
        if process.returncode:
            mark_children_crashed(UUID(task_run.id))
    if process.returncode:
        return Failed(message=error or f"{label}: failed: dvc ended with {process.returncode}")
    if restored:
        return Completed(name="Cached", message="restored from DVC's run cache")
    return Completed(message=f"done in {duration(time.monotonic() - start)}")


def start_dvc(target: str) -> subprocess.Popen[str]:
    """`dvc repro` of one stage in a process group of its own, on this pipeline's server."""
    with get_client(sync_client=True) as client:
        server = str(client.api_url)
    extra = {environment.PARENT_TASK_RUN: str(task_run.id), environment.API_URL: server}
    if environment.API_URL not in os.environ:
        extra[environment.LENT_SERVER] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", target],
        env=environment.child_environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=signal_at_parents_death,
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """What the child says as it says it, without DVC's chatter."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.rstrip()
        if line and not line.strip().startswith(CHATTER):
            yield line


def tell(line: str) -> None:
    """To the terminal and to the task run's log."""
    say(line)
    get_run_logger().info(line)


def mark_children_crashed(parent: UUID) -> None:
    """Flow runs below a task that are still open ended with their process: say so."""
    below = FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[parent]))
    with get_client(sync_client=True) as client:
        for child in client.read_flow_runs(flow_run_filter=below):
            if child.state is None or not child.state.is_final():
                state = Crashed(message="the stage's process ended")
                client.set_flow_run_state(child.id, state, force=True)
