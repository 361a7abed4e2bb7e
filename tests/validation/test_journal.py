"""A benchmark in MLflow: a parent with its numbers, below it a run for each method and seed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tasks import lineage, store
from tasks.tracking import record
from tasks.validation import journal
from tests.validation.outcomes import DIVERGED, SEEDS, failure, outcome

ORIGIN = {"run": "concrete", "stage": "validate", "git.commit": "0" * 40, "git.dirty": "false"}


class Params:
    """What the params of a benchmark offer here."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"damping": {"ratio": 0.1}, "seeds": [0, 1, 2], "retraining": None}


@dataclass
class Context:
    root: Path
    run: str = "concrete"
    stage: str = "validate"
    fingerprint: str = "f" * 64
    params: Params = field(default_factory=Params)
    tags: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkout")


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("out")
    for name in ("result.json", "scores.parquet", "time.png"):
        (out / name).write_text(name)
    return [out / name for name in ("result.json", "scores.parquet", "time.png")]


@pytest.fixture(scope="module")
def logged(root: Path, client: Any, files: list[Path]) -> Any:
    """The parent, and its children by name."""
    failed = outcome().methods | {"lissa": failure()}
    further = {"ekfac": [{"spearman": 0.8, "seconds/fit": 2.5 + seed} for seed in SEEDS]}
    entry = journal.benchmark_entry(
        Context(root), time.time(), outcome(methods=failed), files, further, ORIGIN
    )  # pyright: ignore[reportArgumentType]
    parent = client.get_run(record(root, entry))
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs = client.search_runs([parent.info.experiment_id], below)
    return parent, {run.info.run_name: run for run in runs}


def test_the_parent_has_the_numbers_the_params_and_the_files(client, logged, files):
    parent, _ = logged
    assert (parent.info.run_name, parent.info.status) == ("concrete", "FINISHED")
    assert client.get_experiment(parent.info.experiment_id).name == "benchmarks"
    metrics, tags = parent.data.metrics, parent.data.tags
    assert metrics["pearson/ekfac"] == 0.91
    assert metrics["truth/exact_0.1"] == 0.9994
    assert metrics["truth/linearity_1"] == 0.09
    assert (metrics["lds/ekfac"], metrics["lds/ceiling"]) == (0.44, 0.78)
    assert metrics["rank/32"] == 0.997
    assert metrics["mislabelled/ekfac_0.2"] == 0.93
    assert parent.data.params["damping.ratio"] == "0.1"
    assert (tags["run"], tags["benchmark"], tags["stage"]) == ("concrete", "concrete", "validate")
    assert tags["digest.metrics"] == store.digest(files[0])
    assert "LiSSA failed: diverged at iteration 37" in tags["mlflow.note.content"]
    for folder, names in {
        "figures": ["time.png"],
        "tables": ["result.json", "scores.parquet"],
    }.items():
        there = client.list_artifacts(parent.info.run_id, folder)
        assert [Path(each.path).name for each in there] == names


def test_a_sweep_is_a_series_over_what_is_swept(client, logged):
    parent, _ = logged
    points = client.get_metric_history(parent.info.run_id, "by_blocks/ekfac_reference")
    assert [(point.step, point.value) for point in points] == [
        (1, 1.0), (2, 0.98), (4, 0.95), (8, 0.91), (16, 0.86),
    ]  # fmt: skip
    points = client.get_metric_history(parent.info.run_id, "by_damping/kfac_reference")
    assert [point.step for point in points] == [10_000, 30_000, 100_000, 300_000, 1_000_000]


def test_a_child_is_a_method_and_a_seed(logged):
    parent, children = logged
    assert len(children) == len(SEEDS) * len(outcome().methods)
    one = children["concrete ekfac seed 1"]
    assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert one.data.params == {"benchmark": "concrete", "method": "ekfac", "seed": "1"}
    assert {key: one.data.tags[key] for key in one.data.params} == one.data.params
    assert one.data.metrics["pearson"] == 0.91
    assert (one.data.metrics["spearman"], one.data.metrics["seconds/fit"]) == (0.8, 3.5)
    assert one.data.metrics["all_seeds/pearson_exact"] == pytest.approx(0.911)


def test_a_method_that_failed_is_a_failed_run_that_says_why(logged):
    _, children = logged
    for seed in SEEDS:
        run = children[f"concrete lissa seed {seed}"]
        assert run.info.status == "FAILED"
        assert run.data.tags["failed"] == DIVERGED
        assert "pearson" not in run.data.metrics
    assert children["concrete ekfac seed 0"].info.status == "FINISHED"


def test_a_store_that_fails_costs_a_line(tmp_path, files, capsys, monkeypatch):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    monkeypatch.setattr(lineage, "benchmark_tags", lambda context, params: ORIGIN)
    context = Context(tmp_path)
    assert journal.record_benchmark(context, time.time(), outcome(), files) is None  # pyright: ignore
    told = capsys.readouterr().out
    assert "validate@concrete: WARNING: not logged to MLflow" in told
    assert "`dvc repro --force --single-item validation/dvc.yaml:validate@concrete`" in told


def test_what_was_not_measured_is_not_logged():
    bare = outcome(
        truth=(), lissa=(), astra=(), dampings=(), ranks=(), splits=(), fit_sizes=(),
        retrained=None, mislabelled=None, methods={"ekfac": outcome().methods["ekfac"]},
    )  # fmt: skip
    assert journal.sweep_series(bare) == {}
    assert set(journal.metrics_by_section(bare)) == {
        "pearson/ekfac", "pearson_low/ekfac", "pearson_high/ekfac",
        "above_dot/ekfac", "above_dot_low/ekfac", "seconds/all",
    }  # fmt: skip
