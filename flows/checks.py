"""What every door asks of a name first: a run's or a benchmark's, and is its input in order?"""

from pathlib import Path

from tasks.active import check_active, check_inputs
from tasks.corpora import Corpus, documents
from tasks.faraway import is_far
from tasks.params import load_params, params_file
from tasks.querylines import check_queries
from tasks.validation.activation import check_active_benchmark, check_data
from tasks.validation.settings import benchmark_file, is_benchmark, load_benchmark
from tasks.workspace import STAGES

BENCHMARK_STAGES = ("validate",)


def check(root: Path, name: str) -> str:
    """That params and input are in order; the run whose fit is used (a benchmark uses its own).

    Raises:
        ValueError: naming the file and key that is wrong.
    """
    if is_benchmark(root, name):
        benchmark = load_benchmark(root, name)
        check_active_benchmark(root, name, benchmark)
        check_data(root, name, benchmark)
        return name
    params = load_params(root, name)
    fit = check_active(root, name, params)
    check_inputs(root, name, params)
    check_queries(root / params.query.path)
    if not is_far(params.corpus.path):  # its first document; all others when they are tokenised
        next(documents(Corpus.of(params.corpus, root)), None)
    return fit


def file_of(root: Path, name: str) -> Path:
    """The params file of a run or benchmark, relative to the project's root."""
    return benchmark_file(name) if is_benchmark(root, name) else params_file(name)


def stages_of(root: Path, name: str) -> tuple[str, ...]:
    """The stages of a run, or the one of a benchmark."""
    return BENCHMARK_STAGES if is_benchmark(root, name) else STAGES


def last_stage(root: Path, name: str, until: str | None) -> str:
    """`until`, or the last stage there is.

    Raises:
        ValueError: if a benchmark has no such stage.
    """
    stages = stages_of(root, name)
    if until is not None and until not in stages:
        raise ValueError(
            f"{name} is a benchmark and has one stage, {stages[-1]}: there is no {until}; "
            f"take {stages[-1]}, or the name of a run"
        )
    return until or stages[-1]
