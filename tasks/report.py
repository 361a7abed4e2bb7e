"""Stage `report`: one self-contained HTML page of a run, for a person to read."""

from pathlib import Path

from tasks import store
from tasks.page.document import document
from tasks.page.evidence import Evidence
from tasks.tracking import attach
from tasks.workspace import StageContext

PAGE = "index.html"
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
        top=store.read_table(score / "top.parquet").to_pylist(),
        metrics=store.read_json(validate / "metrics.json"),
        recall=store.read_json(validate / "recall.json"),
        expected=store.read_json(validate / "expected.json"),
        baselines=store.read_table(validate / "baselines.parquet").to_pylist(),
        plots=_plots(validate),
        ground_truth=store.read_json(GROUND_TRUTH),
    )


def _plots(folder: Path) -> dict[str, bytes]:
    """Content of the PNG files in a folder and below, by name without the ending."""
    return {file.stem: file.read_bytes() for file in sorted(folder.rglob("*.png"))}
