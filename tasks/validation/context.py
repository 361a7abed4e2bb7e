"""Where a benchmark works: as a stage of a run does, and its numbers go where git keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.validation.settings import BenchmarkParams
from tasks.workspace import Context

RESULT = "result.json"  # its name in `out`
RESULTS = Path("docs/results")
FIGURES = ("correlation.png", "time.png", "scatter.png", "sweeps.png")
SCORES = "scores.parquet"


@dataclass(frozen=True, slots=True)
class BenchmarkContext(Context):
    """All that the stage `validate` of a benchmark is told.

    Attributes:
        params: those of `params/benchmarks/<run>.yaml`.
    """

    params: BenchmarkParams

    @property
    def module(self) -> str:
        """The code of the stage."""
        return "tasks.benchmark"

    @property
    def elsewhere(self) -> Mapping[str, Path]:
        """The numbers, which are no artefact: git keeps them, and DVC shows how they change."""
        return {RESULT: self.root / result_file(self.run)}


def result_file(name: str) -> Path:
    """The numbers of a benchmark, relative to the project's root."""
    return RESULTS / f"{name}.json"
