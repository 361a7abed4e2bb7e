"""The pipeline as a Prefect flow: one task a stage; DVC decides which stages run.

A stage that is up to date ends as `Cached`; another is run by `dvc repro`, in a process of its own,
with code and memory of its own. `dvc.lock` has one writer, whichever door was used.
"""

import os
import re
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
from flows.processes import end_group, end_server_with_this_process, signal_at_parents_death
from tasks import dvcstage
from tasks.progress import duration, say
from tasks.workspace import STAGES, find_root

KILLED = re.compile(r"exited with -(\d+)")
RESTORED = "is cached - skipping run"  # DVC's word for its run cache
CHATTER = (  # what DVC says of itself, every time
    "Running stage ",
    "> exec python -m flows.stage",
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "To enable auto staging",
    "Use `dvc push`",
    "git add",
    "dvc config core.autostage",
    "ERROR: failed to reproduce",
    "WARNING: Process '",  # that a killed one held a lock, which DVC has taken from it
)


@flow(name="pipeline", flow_run_name="{run} until {until}", validate_parameters=False)
def pipeline(run: str, until: str) -> Any:
    """Bring every stage of a run up to `until` up to date."""
    end_server_with_this_process()
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
    lines: list[str] = []
    try:
        for line in lines_of(process):
            lines.append(line)
            if not line.strip().startswith(CHATTER):
                tell(line)
        process.wait()
    finally:
        end_group(process)
        if process.returncode:
            mark_children_crashed(UUID(task_run.id))
    if process.returncode:
        return Failed(message=reason(label, lines))
    if any(RESTORED in line for line in lines):
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
    """What the child says, as it says it."""
    assert process.stdout is not None
    for raw in process.stdout:
        if line := raw.rstrip():
            yield line


def reason(label: str, lines: list[str]) -> str:
    """Why a stage failed: its own sentence, else the signal that killed it, else DVC's words."""
    for line in lines:
        if line.startswith(f"{label}: error:"):
            return line
    for line in reversed(lines):
        if killed := KILLED.search(line):
            return f"{label}: error: its process was killed (signal {killed.group(1)})"
        if line.startswith("ERROR:"):
            return f"{label}: {line}"
    return f"{label}: error: dvc failed and did not say why"


def tell(line: str) -> None:
    """To the terminal and to the task run's log."""
    say(line)
    get_run_logger().info(line)


def mark_children_crashed(parent: UUID) -> None:
    """Runs below a task that are still open ended with their process: say so."""
    below = FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[parent]))
    state = Crashed(message="the stage's process ended")
    with get_client(sync_client=True) as client:
        for shard in client.read_task_runs(flow_run_filter=below):
            if shard.state is None or not shard.state.is_final():
                client.set_task_run_state(shard.id, state, force=True)
        for child in client.read_flow_runs(flow_run_filter=below):
            if child.state is None or not child.state.is_final():
                client.set_flow_run_state(child.id, state, force=True)
