"""A run's stages as Prefect tasks: one task a stage; DVC decides which stages run.

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

from prefect import get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.runtime import task_run
from prefect.states import Completed, Failed

from flows import environment
from flows.checks import stages_of
from flows.processes import end_group, signal_at_parents_death
from tasks import dvcstage
from tasks.active import owner
from tasks.leftovers import damaged_cache
from tasks.progress import duration, say
from tasks.workspace import ARTIFACTS, find_root

KILLED = re.compile(r"exited with -(\d+)")
BUSY = re.compile(r"(is busy, it is being blocked by|Unable to acquire lock)")
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


def bring_up_to_date(root: Path, run: str, until: str) -> dict[str, Any]:
    """Every stage of a run up to `until`: their states by name, ending at one that failed."""
    states, stages = dict[str, Any](), stages_of(root, run)
    for stage in stages[: stages.index(until) + 1]:
        # Called, not submitted: only in the main thread does a cancel end the wait for the child.
        states[stage] = dvc_stage.with_options(
            name=stage, task_run_name=f"{stage}@{owner(root, stage, run)}"
        )(
            stage,
            run,
            wait_for=[states[name] for name in dvcstage.upstream(root, stage, run)],
            return_state=True,
        )
        if not states[stage].is_completed():
            break
    return states


@task(persist_result=False)
def dvc_stage(stage: str, run: str) -> Any:
    """Run one stage by DVC if DVC finds a reason to."""
    root, start = find_root(Path.cwd()), time.monotonic()
    label = f"{stage}@{owner(root, stage, run)}"
    try:
        reasons = dvcstage.pending(root, stage, run)
    except ValueError as raised:
        return Failed(message=f"{label}: {raised}")
    if not reasons:
        tell(f"{label}: cached")
        return Completed(name="Cached", message="up to date")
    if any(each.startswith("changed outs") for each in reasons):
        # Who edits an artefact as root edits DVC's cache through the link, and DVC restores that.
        for damaged in damaged_cache(root, ARTIFACTS / owner(root, stage, run) / stage):
            tell(f"{label}: its artefact was edited in place; it is made again")
            damaged.remove()
    tell(f"{label}: runs ({reasons[0]}{', …' if len(reasons) > 1 else ''})")
    process = start_dvc(dvcstage.target(root, stage, run))
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
    if any(BUSY.search(line) for line in lines):
        return (
            f"{label}: error: DVC is at work in this checkout through another door (`dvc repro` "
            "in a terminal?); wait for it to end and run again"
        )
    for line in reversed(lines):
        if line.startswith("ERROR:"):
            return f"{label}: {line}"
    return f"{label}: error: dvc failed and did not say why"


def tell(line: str) -> None:
    """To the terminal and to the task run's log."""
    say(line)
    get_run_logger().info(line)
