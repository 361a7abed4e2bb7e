"""What Prefect's UI shows of a run beside its states: outputs, top sequences, links."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows import environment
from tasks import dvcstage
from tasks.terminal import top_rows
from tasks.tracking import logged_run
from tasks.validation.context import FIGURES, result_file
from tasks.validation.settings import is_benchmark
from tasks.workspace import ARTIFACTS, STAGES, Context

SHOWN = 5  # sequences a query and sign


@contextmanager
def only_shown() -> Iterator[None]:
    """What is only shown never fails the work: the log says what was missing."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("could not be shown: %s", error)


def show_run(root: Path, run: str, states: Mapping[str, Any]) -> None:
    """Outputs of all stages, and the top sequences and links as far as the run has them.

    Args:
        root: the checkout.
        run: name of the run.
        states: final Prefect states by stage.
    """
    with only_shown():
        create_markdown_artifact(
            _outputs(root, run, states), key=_key(run, "outputs"), description=f"Outputs of {run}"
        )
    if "score" in states:
        show_top(root, run)
    benchmark = is_benchmark(root, run)
    if benchmark:
        _show_figures(run)
    numbers = result_file(run) if benchmark else ARTIFACTS / run / "validate/metrics.json"
    if "validate" in states and (ids := logged_run(root, run, root / numbers)):
        _link(run, "mlflow", environment.mlflow_url(*ids), f"{run} in MLflow")
    if "report" in states:
        _link(run, "report", environment.report_url(run), f"Report of {run}")


def show_stage(context: Context) -> None:
    """The files that a stage wrote; after `score` also what they say."""
    files = sorted(file for file in context.published.rglob("*") if file.is_file())
    files += sorted(context.elsewhere.values())
    rows = [
        f"| `{file.relative_to(context.root)}` | {size(file.stat().st_size)} |" for file in files
    ]
    with only_shown():
        create_markdown_artifact(
            "\n".join(["| file | size |", "|---|---:|", *rows]),
            key=_key(context.run, f"{context.stage}-files"),
            description=f"Files of {context.stage}@{context.run}",
        )
    if context.stage == "score":
        show_top(context.root, context.run)


def show_plan(run: str, told: str) -> None:
    """What the run will cost, in Markdown."""
    with only_shown():
        create_markdown_artifact(told, key=_key(run, "plan"), description=f"Plan of {run}")


def show_top(root: Path, run: str) -> None:
    """The top sequences of each query as a table."""
    with only_shown():
        create_table_artifact(
            list(top_rows(root, run, SHOWN)),
            key=_key(run, "top"),
            description=f"Top sequences of {run}: nats of log p(completion | prompt) per copy",
        )


def _show_figures(run: str) -> None:
    for name in FIGURES:
        what = Path(name).stem
        with only_shown():
            create_image_artifact(
                environment.figure_url(run, name),
                key=_key(run, what),
                description=f"{what.capitalize()} of {run}",
            )


def _link(run: str, what: str, url: str, text: str) -> None:
    with only_shown():
        create_link_artifact(url, link_text=text, key=_key(run, what), description=text)


def _outputs(root: Path, run: str, states: Mapping[str, Any]) -> str:
    lines = ["| stage | state | output | md5 | size |", "|---|---|---|---|---:|"]
    for out in dvcstage.recorded_outs(root, run, [name for name in STAGES if name in states]):
        state = states[out.stage]
        lines.append(
            f"| {out.stage} | {state.name} ({state.message}) | `{out.path}` | `{out.digest}` | "
            f"{size(out.num_bytes)} |"
        )
    return "\n".join(lines)


def size(num_bytes: int) -> str:
    """Bytes for people: `812 B`, `4.1 kB`, `2.3 GB`."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def _key(run: str, what: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9-]+", "-", f"{run}-{what}")
