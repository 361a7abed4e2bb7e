"""`python -m flows.stage STAGE NAME`: the command of each DVC stage, one Prefect flow.

All that can be wrong with the input is checked before the work starts. The flow nests under the
pipeline's task when there is one, and runs on a server of its own when there is none.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from flows import environment
from flows.checks import check, last_stage
from flows.processes import (
    INTERRUPTED,
    end_when_interrupted,
    end_when_terminated,
    end_with_parent,
    have_witness,
)
from tasks import dvcstage, workspace
from tasks.params import load_params
from tasks.planning import measured
from tasks.progress import duration, say
from tasks.validation import results
from tasks.validation.context import BenchmarkContext
from tasks.validation.settings import is_benchmark, load_benchmark
from tasks.workspace import FIT_STAGES, STAGES, Context, StageContext

USER_ERRORS = (ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; the exit status: 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.stage", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("run", metavar="NAME", help="of a run or a benchmark")
    given = parser.parse_args(arguments)
    label, start = f"{given.stage}@{given.run}", time.monotonic()
    end_when_interrupted(label)
    if "DVC_STAGE" in os.environ:
        end_with_parent()
    try:
        error = run_stage(open_stage(Path.cwd(), given.stage, given.run))
    except USER_ERRORS as raised:
        error = raised
    except KeyboardInterrupt:
        return INTERRUPTED
    if error is not None:
        _complain(label, error)
        return 1
    say(f"{label}: done in {duration(time.monotonic() - start)}")
    return 0


def open_stage(start: Path, stage: str, run: str) -> Context:
    """The context of a stage, after all that can be checked before the work.

    Raises:
        ValueError: naming the file and key that is wrong.
    """
    root = workspace.find_root(start)
    environment.set_environment(root)
    fit = check(root, run)
    last_stage(root, run, stage)
    if stage in FIT_STAGES and fit != run:
        raise ValueError(
            f"run {run} uses the fit of {fit}: run `python -m flows.stage {stage} {fit}` instead"
        )
    environment.check_server()
    if is_benchmark(root, run):
        benchmark = load_benchmark(root, run)
        fingerprint = dvcstage.input_fingerprint(root, stage, run, benchmark.runtime)
        return BenchmarkContext(run, stage, benchmark, root, fingerprint)
    params = load_params(root, run)
    fingerprint = dvcstage.input_fingerprint(root, stage, run, params.runtime)
    reads = tuple(dvcstage.upstream(root, stage, run))
    return StageContext(run, stage, params, root, fingerprint, fit, reads)


def run_stage(context: Context) -> BaseException | None:
    """Run the stage's flow to its end; what it failed with, if it failed."""
    from prefect.flow_engine import run_flow_sync

    flow = stage_flow(context)
    parameters = {"stage": context.stage, "run": context.run}
    flow_run = _nested_run(flow, parameters)
    state: Any = run_flow_sync(flow, flow_run, parameters, return_type="state")
    result = state.result(raise_on_failure=False)
    return result if isinstance(result, BaseException) else None


def stage_flow(context: Context) -> Any:
    """The Prefect flow of one stage."""
    from prefect import flow
    from prefect.states import Failed

    from flows.artifacts import show_stage
    from flows.limits import accelerator
    from tasks.shards import task_runner

    def stage_of_run(stage: str, run: str) -> Any:
        have_witness()
        end_when_terminated(f"{stage}@{run}")
        try:
            with accelerator(context.params.runtime):
                work(dataclasses.replace(context, tags=_tags()))
            show_stage(context)
        except USER_ERRORS as error:
            return Failed(message=str(error), data=error)
        return f"{stage}@{run}"

    return flow(
        name="stage",
        flow_run_name=f"{context.stage}@{context.run}",
        description=__doc__,
        task_runner=task_runner(context.params.runtime),
        validate_parameters=False,
        persist_result=False,
    )(stage_of_run)


def work(context: Context) -> None:
    """Compute the stage and publish its artefact: complete, or not there."""
    module, whole = importlib.import_module(context.module), not measured.has_partials(context)
    workspace.prepare(context)
    module.run(context)
    workspace.publish(context)
    with contextlib.suppress(OSError):  # the work is done: what it took is only told
        measured.record_stage(context, whole)
    if isinstance(context, BenchmarkContext):
        results.write(context.root)


def _nested_run(flow: Any, parameters: dict[str, str]) -> Any:
    """A flow run under the pipeline's task; None if no pipeline started this stage."""
    parent = os.environ.get(environment.PARENT_TASK_RUN)
    if not parent:
        return None
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.create_flow_run(flow, parameters=parameters, parent_task_run_id=UUID(parent))


def _tags() -> dict[str, str]:
    """Who runs this stage: Prefect's ids, DVC's experiment."""
    from prefect.runtime import flow_run

    tags = {"prefect.flow_run_id": str(flow_run.id), "prefect.flow_run_name": str(flow_run.name)}
    if flow_run.root_flow_run_id:
        tags["prefect.root_flow_run_id"] = str(flow_run.root_flow_run_id)
    if os.environ.get(environment.API_URL) and environment.LENT_SERVER not in os.environ:
        tags["prefect.url"] = str(flow_run.ui_url)
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.exp"] = name
    return tags


def _complain(label: str, error: BaseException) -> None:
    """One sentence for what the user can mend; for our own faults the traceback after it."""
    sys.stdout.flush()
    sys.stderr.write(f"{label}: error: {error or type(error).__name__}\n")
    if not isinstance(error, USER_ERRORS):
        traceback.print_exception(error)


if __name__ == "__main__":
    sys.exit(main())
