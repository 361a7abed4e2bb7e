"""The flows that a person starts, from a form in Prefect's UI or from a shell.

Each writes what the form says into the params, and then brings the run's stages up to date.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows import artifacts, planning
from flows.checks import check
from flows.dvcflow import bring_up_to_date
from flows.forms import Adjustments, Changes, Measurements, Stage, TypedQuery
from flows.lock import workspace_lock
from flows.processes import have_witness
from tasks import dvcstage, overrides, store
from tasks.active import activate, load_active
from tasks.params import params_file, run_file
from tasks.querylines import check_queries
from tasks.workspace import FIT_STAGES, find_root

QUERY_SETS = Path("data/queries")

RunName = Annotated[str, Field(title="Run", description="params/RUN.yaml")]
NewRun = Annotated[
    str | None,
    Field(
        title="Name of a new run",
        description="Makes params/NAME.yaml from the run above with these changes; both stay "
        "and share the fit where they can. Empty: the run itself is changed",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
    ),
]


def _flow_run_name() -> str:
    given = flow_run.parameters
    run = given.get("name") or given.get("new_run") or given["run"]
    return f"{run} until {given['until']}" if "until" in given else f"{run}"


@flow(name="pipeline", flow_run_name=_flow_run_name, persist_result=False)
def pipeline(
    run: RunName,
    until: Annotated[Stage, Field(title="Until", description="the last stage")] = "report",
    changes: Annotated[Changes, Field(title="Changes")] = Changes(),  # noqa: B008
    new_run: NewRun = None,
) -> Any:
    """From a run's params to its report: brings every stage up to date, one after another.

    What is up to date is not run again (`Cached`); a stage that was killed resumes at the shards it
    lacks. Changing damping, rank or queries refits nothing.
    """
    return work(lambda root: _changed(root, run, new_run, changes.settings()), until)


@flow(name="validate", flow_run_name=_flow_run_name, persist_result=False)
def validate(
    run: RunName,
    changes: Annotated[Measurements, Field(title="Changes")] = Measurements(),  # noqa: B008
) -> Any:
    """How far a run's scores can be trusted; logged to MLflow for comparison with other runs.

    Agreement of two halves of the corpus, recall of the filter, cost of the truncation, baselines.
    """
    return work(lambda root: _changed(root, run, None, changes.settings()), "validate")


@flow(name="queries", flow_run_name=_flow_run_name, persist_result=False)
def queries(
    run: Annotated[str, Field(title="Run", description="whose fit is used; it must be fitted")],
    name: Annotated[
        str,
        Field(
            title="Name",
            description="of the run that keeps the answers: params/NAME.yaml, artifacts/NAME",
            pattern=r"^[a-z0-9][a-z0-9_-]*$",
        ),
    ],
    file: Annotated[
        str | None,
        Field(
            title="Query set",
            description="path of a .jsonl file, from the project's root; or the name of one in "
            "data/queries, such as facts",
        ),
    ] = None,
    typed: Annotated[
        list[TypedQuery] | None,
        Field(title="Queries", description="or type them here; kept as data/queries/NAME.jsonl"),
    ] = None,
    changes: Annotated[Adjustments, Field(title="Changes")] = Adjustments(),  # noqa: B008
) -> Any:
    """Ask a fitted model something else: a query set against curvature that is there already.

    Nothing is fitted. The answers are a run of their own, beside those of the run they are taken
    from, with a report of their own.
    """

    def prepare(root: Path) -> str:
        path = _query_set(root, name, file, typed)
        return _asked(root, run, name, {"query.path": path, **changes.settings()})

    return work(prepare, "report")


@flow(name="benchmark", flow_run_name="{run}", persist_result=False)
def benchmark(
    run: Annotated[str, Field(title="Benchmark", description="params/benchmarks/NAME.yaml")],
) -> Any:
    """How well each estimator agrees with the true response of a model that is small enough to ask.

    Trains it, takes the true response of its outputs to each training example, holds the
    estimators against it, and writes docs/results/NAME.json and figures; logged to MLflow.
    """
    return work(lambda _root: run, "validate")


def work(prepare: Callable[[Path], str], until: str) -> Any:
    """In the workspace, alone: write the params, check the input, run the stages, show the result.

    Args:
        prepare: writes what the form says and gives the name of the run.
        until: the last stage.
    """
    have_witness()
    root = find_root(Path.cwd())
    try:
        with workspace_lock(root):
            run = prepare(root)
            check(root, run)
            planned = planning.task_of(root, run, until)
            if not planned.is_completed():
                return Failed(message=planned.message)
            states = bring_up_to_date(root, run, until)
            last = list(states.values())[-1]
            if not last.is_completed():
                return Failed(message=last.message)
            artifacts.show_run(root, run, states)
    except (ValueError, OSError) as error:
        return Failed(message=str(error))
    return Completed(message=f"{run} is up to date until {until}")


def _changed(root: Path, run: str, new: str | None, settings: dict[str, Any]) -> str:
    """Write a form's settings to a run's params, or to those of a new one; its name."""
    if new:
        told = overrides.new_run(root, new, run, settings)
    else:
        told = overrides.change_params(root, run, settings)
    _activated(root, new or run, told)
    return new or run


def _asked(root: Path, base: str, name: str, settings: dict[str, Any]) -> str:
    """The params of a run that asks something of another's fit, written; its name.

    Raises:
        ValueError: if that fit is not there: this door never fits.
    """
    if name == base:
        raise ValueError(f"the answers want a name of their own, not that of the run {base!r}")
    _check_fitted(root, base)
    if (root / run_file(name)).exists():
        told = overrides.change_params(root, name, settings)
    else:
        told = overrides.new_run(root, name, base, settings)
    _activated(root, name, told)
    _check_fitted(root, name)
    return name


def _activated(root: Path, run: str, told: list[str]) -> None:
    """Tell what was written, and let DVC know of the run."""
    log = get_run_logger()
    for line in told:
        log.info("%s: %s", params_file(run), line)
    if activate(root, run):
        fit = load_active(root).runs[run].fit
        log.info(
            "params/active.yaml: %s, with the fit of %s", run, "its own" if fit == run else fit
        )
        from flows.deploy import refresh  # which imports this module

        with artifacts.only_shown():
            refresh(root)


def _check_fitted(root: Path, run: str) -> None:
    for stage in FIT_STAGES:
        if reasons := dvcstage.pending(root, stage, run):
            raise ValueError(
                f"the fit that {run} uses is not up to date ({stage}: {reasons[0]}); bring it up "
                f"to date first: deployment `pipeline`, run {run}, until correct"
            )


def _named_set(root: Path, given: str) -> Path:
    """The path of a query set that is given by path, or by its name in data/queries.

    Raises:
        ValueError: naming those that there are, if none has this name.
    """
    if "/" in given or given.endswith((".jsonl", ".gz", ".zst")):
        return Path(given)
    path = QUERY_SETS / f"{given}.jsonl"
    if not (root / path).is_file():
        there = ", ".join(sorted(file.stem for file in (root / QUERY_SETS).glob("*.jsonl")))
        raise ValueError(
            f"there is no query set {given!r} in {QUERY_SETS}: there are {there}; or give the path "
            "of a .jsonl file"
        )
    return path


def _query_set(root: Path, name: str, file: str | None, typed: list[TypedQuery] | None) -> str:
    """The path of the query set, checked; typed queries are written to a file of that name."""
    if bool(file) == bool(typed):
        raise ValueError("give a query set (a .jsonl file) or type some queries: one of the two")
    if file:
        found = _named_set(root, file)
        check_queries(root / found)
        return found.as_posix()
    path = QUERY_SETS / f"{run_file(name).stem}.jsonl"
    lines = [
        json.dumps(each.model_dump(exclude_none=True), ensure_ascii=False) for each in typed or ()
    ]
    text = "".join(f"{line}\n" for line in lines)
    if (root / path).exists() and (root / path).read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} exists and holds other queries; take another name")
    store.write_text(root / path, text)
    check_queries(root / path)
    return path.as_posix()
