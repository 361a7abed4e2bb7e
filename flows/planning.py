"""`python -m flows plan RUN`: what a run will cost; and the same as the first task of a pipeline.

The task plans in a process of its own, which ends with the memory that sizing a model takes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows import environment
from tasks import dvcstage
from tasks.active import load_active
from tasks.params import load_params
from tasks.planning.measured import measured_stages
from tasks.planning.plan import Plan, fitting_plan, plan_key, plan_run, stored_plan
from tasks.planning.table import COLUMNS, COMPARED, compared_rows, markdown, plan_rows, terminal
from tasks.progress import say
from tasks.validation.settings import is_benchmark
from tasks.workspace import STAGES

CANNOT_FIT = 3  # exit status
PATIENCE = 180.0  # seconds; a pipeline does not wait longer for a plan
SWITCH = "INFLUENCE_PLAN"  # set to `no`: pipelines do not plan
DESCRIPTION = """
Print what each stage of a run will cost: tokens, work in fb (one forward and backward of training
over the same tokens), peak memory of device and host, disk, time; after the run, beside what it
took. A run that cannot fit is refused, with the smallest change that would.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("run", metavar="NAME", help="params/NAME.yaml")
    parser.add_argument(
        "--hardware",
        metavar="FIGURES",
        help="of a machine that is not at hand: tflops=400,memory=80GiB,disk_gbps=2,devices=8; "
        "also host_memory, disk, host_gflops",
    )
    parser.add_argument("--anew", action="store_true", help="even if a plan is stored")
    parser.add_argument(
        "--no-probe", dest="probe", action="store_false",
        help="time nothing: what was probed before, else no times",
    )  # fmt: skip


def run_plan(root: Path, given: argparse.Namespace) -> int:
    """Print the plan; 3 if the run cannot fit."""
    if is_benchmark(root, given.run):
        raise ValueError(f"{given.run} is a benchmark; plan takes the name of a run")
    fit = fit_of(root, given.run)
    plan = plan_run(root, given.run, fit, given.hardware, given.anew, given.probe)
    for line in (*plan.told, *terminal(COLUMNS, plan_rows(plan))):
        say(line)
    measured = {} if given.hardware else measured_stages(root, given.run, fit)
    if rows := compared_rows(plan, measured):
        say("\nplanned and taken, and their ratio")
        for line in terminal(COMPARED, rows):
            say(line)
    for fault in plan.faults:
        sys.stderr.write(f"{fault}\n")
    return CANNOT_FIT if plan.faults else 0


def fit_of(root: Path, run: str) -> str:
    """The run whose fit a run uses; a run that is not active would have its own."""
    entry = load_active(root).runs.get(run)
    return entry.fit if entry else run


def plan_ahead(root: Path, run: str, until: str) -> Plan | None:
    """The plan of a run that is about to start; None if it could not be made.

    Raises:
        ValueError: if a stage that is to run cannot fit, with the change that would.
    """
    if os.environ.get(SWITCH) == "no" or is_benchmark(root, run):
        return None
    plan = _planned(root, run)
    if plan is None:
        say("plan: could not be made; the run goes on without")
        return None
    asked = STAGES[: STAGES.index(until) + 1]
    if any(stage in asked and dvcstage.pending(root, stage, run) for stage in plan.blocked):
        raise ValueError("; ".join(plan.faults))
    return plan


def _planned(root: Path, run: str) -> Plan | None:
    key = plan_key(root, run, fit_of(root, run), load_params(root, run))
    if (stored := fitting_plan(root, run, key)) is not None:
        return stored
    # A probe may take a minute, which a short run should not wait for.
    command = [sys.executable, "-m", "flows", "plan", run, "--no-probe"]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment.child_environment(), capture_output=True,
            text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (0, CANNOT_FIT):
        say(f"plan: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
        return None
    return stored_plan(root, run, key)


def told(root: Path, plan: Plan) -> str:
    """A plan in Markdown, beside what earlier executions took."""
    return markdown(plan, measured_stages(root, plan.run, fit_of(root, plan.run)))


def task_of(root: Path, run: str, until: str) -> Any:
    """Plan as a task of the flow run that this is called in, and show it; its final state."""
    from prefect import task
    from prefect.states import Completed, Failed

    from flows.artifacts import show_plan

    def plan() -> Any:
        try:
            made = plan_ahead(root, run, until)
        except ValueError as error:
            if (made := stored_plan(root, run)) is not None:
                show_plan(run, told(root, made))
            return Failed(message=str(error))
        if made is None:
            return Completed(message="no plan")
        show_plan(run, told(root, made))
        return Completed(message=f"{run} fits")

    named = task(name="plan", task_run_name=f"plan@{run}", persist_result=False)(plan)
    return named(return_state=True)
