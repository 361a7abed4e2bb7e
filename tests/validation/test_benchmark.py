"""A whole benchmark, small: real data, real training, real responses, every number in place."""

from collections.abc import Iterator

import pytest
import torch

from tasks import benchmark, store, workspace
from tasks.validation.activation import activate_benchmark
from tasks.validation.context import FIGURES, RESULT, SCORES, BenchmarkContext
from tasks.validation.settings import load_benchmark
from tests.checkout import make_checkout


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[BenchmarkContext, dict]]:
    """The benchmark `quick`, computed in a folder of its own."""
    folder = make_checkout(tmp_path_factory.mktemp("benchmark") / "project").path
    activate_benchmark(folder, "quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        params = load_benchmark(folder, "quick")
        context = BenchmarkContext("quick", "validate", params, folder, "0" * 64)
        workspace.prepare(context)
        benchmark.run(context)
        yield context, store.read_json(context.out / RESULT)


def test_everything_is_written(finished):
    context, _ = finished
    assert {path.name for path in context.out.iterdir()} == {RESULT, SCORES, *FIGURES}


def test_the_truth_is_solved_and_the_exact_solve_agrees_with_it(finished):
    """Eq. 9 is the derivative of the response: at a tenth of a copy nothing is left between."""
    tenth, twentieth, copy = finished[1]["truth"]
    assert tenth["epsilon"] == 0.1
    assert tenth["converged"] == twentieth["converged"] == 1.0
    assert tenth["exact"]["pearson"] > 0.999
    assert tenth["linearity"] < 0.05
    assert copy["exact"]["pearson"] > 0.95


def test_scores_have_the_sign_and_the_size_of_the_response(finished):
    context, _ = finished
    table = store.read_table(context.out / SCORES, ["pbrf", "exact", "ekfac"])
    truth, exact = (torch.tensor(table[name].to_pylist()) for name in ("pbrf", "exact"))
    # Sign, 1/N and the damping: the slope is 1, not merely the correlation.
    assert float((truth @ exact) / (exact @ exact)) == pytest.approx(1, abs=0.02)


def test_better_curvature_agrees_better(finished):
    agreed = {name: each["truth"]["pearson"] for name, each in finished[1]["methods"].items()}
    assert agreed["gradient_dot"] < agreed["ekfac"] < agreed["astra"] < agreed["exact"] + 1e-9
    assert agreed["lissa"] > agreed["ekfac"]
    assert agreed["astra"] > 0.97


def test_retrained_models_are_ordered_and_the_ceiling_is_told(finished):
    told = finished[1]["retrained"]
    assert 0 < told["ceiling"]["pearson"] <= 1
    assert set(told["scores"]) >= {"gradient_dot", "ekfac", "exact", "astra"}


def test_sweeps_hold_all_their_points(finished):
    context, result = finished
    given = context.params.estimators
    assert {point["x"] for point in result["ranks"]} == set(given.ranks)
    assert {point["method"] for point in result["dampings"]} == {"ekfac", "kfac", "exact"}
    full = [point for point in result["ranks"] if point["x"] == max(given.ranks)]
    assert full[0]["reference"]["pearson"] == pytest.approx(1, abs=1e-6)
