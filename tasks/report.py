"""Stage `report`: one self-contained HTML page of a run, for a person to read."""

from pathlib import Path
from typing import Any

from tasks import store
from tasks.page.document import document
from tasks.page.evidence import Evidence
from tasks.tracking import attach
from tasks.workspace import StageContext

PAGE, GRID = "index.html", "layer_token_influence"
GROUND_TRUTH = Path(__file__).parent / "page/templates/ground_truth.json"


def run(context: StageContext) -> None:
    """Write index.html from what query, score and validate found; add it to their MLflow run."""
    settings = context.params.report
    page = document(read_evidence(context), settings.top)
    store.write_text(context.out / PAGE, page)
    metrics = context.artifact("validate") / "metrics.json"
    attach(context.root, context.run, metrics, context.out / PAGE, "report")


def read_evidence(context: StageContext) -> Evidence:
    """The facts of the run. A ValueError names the file that is missing or not readable."""
    score, validate = context.artifact("score"), context.artifact("validate")
    return Evidence(
        run=context.run,
        title=context.params.report.title,
        summary=store.read_json(score / "summary.json"),
        queries=store.read_json(context.artifact("query") / "queries.json"),
        top=_top(score / "top.parquet"),
        metrics=store.read_json(validate / "metrics.json"),
        recall=store.read_json(validate / "recall.json"),
        expected=store.read_json(validate / "expected.json"),
        baselines=_ranks(validate / "baselines.parquet"),
        plots=_plots(validate),
        ground_truth=store.read_json(GROUND_TRUTH),
    )


def _top(path: Path) -> list[dict[str, Any]]:
    """Rows, their grids as arrays: Python's numbers would take eight times the memory."""
    table = store.read_table(path)
    at = table.schema.get_field_index(GRID)
    if at < 0:
        return table.to_pylist()
    rows = table.remove_column(at).to_pylist()
    for row, cells in zip(rows, table.column(at), strict=True):
        if cells.is_valid:
            row[GRID] = [layer.values.to_numpy() for layer in cells]
    return rows


def _ranks(path: Path) -> list[dict[str, Any]]:
    """What the page tells of the baselines; a row for every query and candidate."""
    table = store.read_table(path)
    told = [name for name in table.column_names if name.endswith("_rank")]
    return table.select(["query", "row", *told]).to_pylist()


def _plots(folder: Path) -> dict[str, bytes]:
    """Content of the PNG files in a folder and below, by name without the ending."""
    return {file.stem: file.read_bytes() for file in sorted(folder.rglob("*.png"))}
