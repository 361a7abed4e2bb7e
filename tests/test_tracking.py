"""MLflow: what a client reads back, which run a report goes to, and a store that is not there."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import lineage, logbook, tracking
from tasks.halves import Halves
from tasks.registry import Dataset, Factors
from tasks.tracking import Entry, attach, record
from tests.checkout import end_tree, wait_for

MD5 = "5fae1c8f8982dcf716780a4046e9db38.dir"
LAYERS = {"h.2.up": {"split_half": 0.9, "condition": 3.0}, "h.10.up": {"condition": 7.0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose store the tests of this file share: making one takes seconds."""
    return tmp_path_factory.mktemp("checkout")


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """An entry with something of everything; its metrics differ from every other test's."""
    (tmp_path / "metrics.json").write_text(str(tmp_path))
    (tmp_path / "spectra.png").write_bytes(b"png")
    return Entry(
        name="small ratio=0.1 rank=4",
        started=time.time(),
        metrics_file=tmp_path / "metrics.json",
        tags={
            "run": "small",
            "stage": "validate",
            "dvc.in.data/a (1).jsonl": "abc",
            "long": "x" * 9000,
        },
        params={"query.rank": None, "layers": ["mlp"], "bos": True, "title": "Größe"},
        metrics={"split_half/pearson": 0.99, "kind": "tfidf", "nan": float("nan"), "yes": True},
        series={"by_layer/condition": [3.0, float("nan"), 7.0]},
        artifacts={"figures": [tmp_path / "spectra.png"], "tables": [tmp_path / "metrics.json"]},
        dataset=Dataset("data/a.jsonl", "6bc02f76be90216646088933320c5ad1", "candidates", {"n": 7}),
        factors=Factors(
            f"{tmp_path.name}-factors", "artifacts/small/factors", MD5, {"fit": "small"}
        ),
    )


def test_a_client_reads_back_what_was_logged(root, client, entry, tmp_path_factory):
    run = client.get_run(record(root, entry))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "small ratio=0.1 rank=4")
    assert run.data.tags["stage"] == "validate"
    assert run.data.tags["dvc.in.data/a _1_.jsonl"] == "abc"
    assert run.data.params == {
        "query.rank": "null", "layers": '["mlp"]', "bos": "true", "title": "Größe",
    }  # fmt: skip
    assert run.data.metrics == {"split_half/pearson": 0.99, "by_layer/condition": 7.0}
    points = client.get_metric_history(run.info.run_id, "by_layer/condition")
    assert [(point.step, point.value) for point in points] == [(0, 3.0), (2, 7.0)]
    assert artifacts(client, run) == {"figures/spectra.png", "tables/metrics.json"}
    there = str(tmp_path_factory.mktemp("downloaded"))
    folder = Path(client.download_artifacts(run.info.run_id, "tables", there))
    assert (folder / "metrics.json").read_bytes() == entry.metrics_file.read_bytes()
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (entry.dataset.path, entry.dataset.md5)
    assert json.loads(used.dataset.profile) == {"n": 7}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "candidates")]


def artifacts(client: Any, run: Any) -> set[str]:
    folders = [file.path for file in client.list_artifacts(run.info.run_id) if file.is_dir]
    return {f.path for name in folders for f in client.list_artifacts(run.info.run_id, name)}


def test_any_number_of_values_is_logged_in_batches(root, client, entry):
    many = {f"layers.{place}.condition": float(place) for place in range(2500)}
    params = {f"key.{place}": place for place in range(250)}
    start = time.monotonic()
    run = client.get_run(record(root, replace(entry, metrics=many, series={}, params=params)))
    assert time.monotonic() - start < 10  # one call a value would take a minute
    assert run.data.metrics == many
    assert run.data.params == {key: str(value) for key, value in params.items()}


def test_equal_factors_are_one_version_and_the_alias_is_at_those_used_last(root, client, entry):
    other = replace(entry, factors=replace(entry.factors, md5="0" * 32 + ".dir"))
    runs = [client.get_run(record(root, each)) for each in (entry, entry, other, entry)]
    name = entry.factors.name
    assert [run.data.tags["factors"] for run in runs] == [
        f"models:/{name}/{version}" for version in (1, 1, 2, 1)
    ]
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    assert set(versions) == {1, 2}
    assert versions[1].source == f"dvc://artifacts/small/factors?md5={MD5}"
    assert versions[1].run_id == runs[0].info.run_id
    assert versions[1].tags == {"fit": "small"}
    assert int(client.get_model_version_by_alias(name, "current").version) == 1


def test_a_report_goes_to_the_newest_run_that_logged_its_metrics(root, client, entry, tmp_path):
    page = tmp_path / "index.html"
    page.write_text("<p>")
    elsewhere = replace(entry, tags={**entry.tags, "run": "other"})
    second = replace(entry, started=entry.started + 1)
    unfinished = replace(second, artifacts={"tables": [Path("/nowhere/at/all")]})
    first, second, _, failed = [
        record(root, each) for each in (entry, second, elsewhere, unfinished)
    ]
    assert failed is None
    assert attach(root, "small", entry.metrics_file, page, "report") == second
    assert "report/index.html" in artifacts(client, client.get_run(second))
    assert "report/index.html" not in artifacts(client, client.get_run(first))


def test_a_report_without_a_run_is_no_failure(root, entry, tmp_path, capsys):
    record(root, entry)
    entry.metrics_file.write_text("restored from elsewhere")
    assert attach(root, "small", entry.metrics_file, entry.metrics_file, "report") is None
    assert "report@small: MLflow has no run of this validation" in capsys.readouterr().out


def test_to_look_for_a_run_makes_no_store(entry, tmp_path, capsys):
    assert attach(tmp_path, "small", entry.metrics_file, entry.metrics_file, "report") is None
    assert "MLflow has no run of this validation" in capsys.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()


def test_an_experiment_in_a_temporary_checkout_is_logged_to_the_users(root, client, entry):
    inner = root / ".dvc/tmp/exps/tmpabc"
    inner.mkdir(parents=True)
    run = client.get_run(record(inner, entry))
    assert run.info.artifact_uri.startswith((root / "mlruns").as_uri())
    assert not list(inner.iterdir())


# --- a store that fails -------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_told(root: Path, entry: Entry, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    """Neither stage fails or waits long, and each says what happened and what can be done."""
    start = time.monotonic()
    assert record(root, entry) is None
    assert attach(root, "small", entry.metrics_file, entry.metrics_file, "report") is None
    assert time.monotonic() - start < 20
    told = capsys.readouterr().out
    assert told.count("WARNING: not logged to MLflow") == 2
    assert reason in told
    assert "`dvc repro --force --single-item validate@small report@small`" in told
    assert "secret" not in told


def test_an_unreachable_server_costs_no_result(root, entry, capsys, monkeypatch):
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert_told(root, entry, capsys, "Connection refused")


def test_a_server_that_fails_later_costs_no_result(root, entry, capsys, monkeypatch):
    """It answers at first, then with errors: MLflow alone would repeat each call for minutes."""
    program = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200 if 'health' in self.path else 503);"
        " self.end_headers()\n"
        "    do_POST = do_GET\n"
        "    def log_message(self, *_): pass\n"
        "h.HTTPServer(('127.0.0.1', {port}), H).serve_forever()\n"
    )
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", program.format(port=port)])
    try:
        wait_for(lambda: listens(port), 20, "the failing server")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert_told(root, entry, capsys, "503")
    finally:
        end_tree(process.pid)
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_locked_store_costs_no_result(root, client, entry, capsys, monkeypatch):
    record(root, entry)
    monkeypatch.setattr(tracking, "WAIT", 0.5)
    with closing(sqlite3.connect(root / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert_told(root, entry, capsys, "database is locked")
    assert record(root, entry) is not None


def test_a_file_that_is_no_store_costs_no_result(entry, tmp_path, capsys):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    assert_told(tmp_path, entry, capsys, "file is not a database")


def test_a_run_that_could_not_be_finished_is_marked_failed(root, client, entry):
    gone = replace(entry, name="unfinished", artifacts={"tables": [Path("/nowhere/at/all")]})
    assert record(root, gone) is None
    [experiment] = client.search_experiments(filter_string="name = 'influence'")
    [run] = client.search_runs([experiment.experiment_id], "attributes.run_name = 'unfinished'")
    assert run.info.status == "FAILED"


# --- a server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` that keeps runs and artifacts in a folder of its own."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: listens(port), 120, "the MLflow server")
            yield f"http://127.0.0.1:{port}"
        finally:
            end_tree(process.pid)
            process.wait()


@pytest.mark.doors
def test_a_server_is_logged_to_as_the_file_is(server, entry, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run_id = record(tmp_path, entry)
    assert attach(tmp_path, "small", entry.metrics_file, entry.metrics_file, "report") == run_id
    client = MlflowClient(server)
    run = client.get_run(run_id)
    assert run.data.metrics["split_half/pearson"] == 0.99
    assert len(run.inputs.dataset_inputs) == 1
    assert artifacts(client, run) == {
        "figures/spectra.png", "tables/metrics.json", "report/metrics.json",
    }  # fmt: skip
    version = client.get_model_version_by_alias(entry.factors.name, "current")
    assert version.source == entry.factors.source
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


# --- what is logged -----------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A committed checkout with one file of code, params of two runs, and a note."""
    for name in ("tasks/score.py", "params/small.yaml", "params/other.yaml", "dvc.lock", "notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        ("tasks/score.py", "true"),
        ("tasks/new.py", "true"),
        ("params/small.yaml", "true"),
        ("params/other.yaml", "false"),
        ("dvc.lock", "false"),
        ("notes", "false"),
    ],
)
def test_a_run_is_dirty_when_code_or_its_params_differ_from_the_commit(repository, path, dirty):
    clean = lineage.git_tags(repository, Path("params/small.yaml"))
    (repository / path).write_text("2\n")
    found = lineage.git_tags(repository, Path("params/small.yaml"))
    assert len(found["git.commit"]) == 40
    assert clean == {"git.commit": found["git.commit"], "git.dirty": "false"}
    assert found["git.dirty"] == dirty
    assert found.get("git.changed") == (path if dirty == "true" else None)


def test_without_a_commit_nothing_is_claimed(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert lineage.git_tags(tmp_path, Path("params/small.yaml")) == {
        "git.commit": "none",
        "git.dirty": "unknown",
    }


@pytest.mark.parametrize(
    ("query", "experiment", "name"),
    [
        ({"damping": {"ratio": 0.1}, "rank": 32}, None, "small ratio=0.1 rank=32"),
        ({"damping": {"value": 1e-8}, "rank": None}, None, "small value=1e-08 rank=full"),
        ({"damping": {"ratio": 0.3}, "rank": 8}, "wry-pug", "small ratio=0.3 rank=8 (wry-pug)"),
    ],
)
def test_a_run_is_named_for_what_tells_it_apart(query, experiment, name):
    assert logbook.run_name("small", query, experiment) == name


def test_metrics_stand_in_sections_and_layers_by_how_far_they_agree():
    halves = {"pearson": 0.9, "num_queries": 3}
    found = {"split_half": halves, "baselines": {"bm25": {"low": 0.1}}, "layers": LAYERS}
    named = logbook.metrics_by_section(found)
    assert named == {
        "split_half/pearson": 0.9, "baselines/bm25.low": 0.1, "split_half_by_layer/h.2.up": 0.9,
    }  # fmt: skip
    assert next(iter(named)) == "split_half/pearson"


def test_a_layer_agrees_by_its_own_share_of_the_scores():
    torch.manual_seed(0)
    first = torch.randn(3, 20, 3, dtype=torch.float64)
    second = torch.stack([2 * first[..., 0] + 1, -first[..., 1], torch.zeros(3, 20)], dim=-1)
    halves = Halves(("same", "opposite", "idle"), first, second.double())
    found = halves.by_layer(seed=0)
    assert list(found) == ["same", "opposite"]
    assert found["same"] == pytest.approx({"split_half": 1.0, "split_half_low": 1.0})
    assert found["opposite"]["split_half"] == pytest.approx(-1.0)
    assert torch.equal(halves.totals[0], first.sum(dim=-1))


def test_layers_are_a_series_over_the_depth_of_the_model():
    series = logbook.layer_series(LAYERS)
    assert series["by_layer/condition"] == [3.0, 7.0]
    assert series["by_layer/split_half"] == pytest.approx([0.9, float("nan")], nan_ok=True)


def test_nested_values_get_dotted_names():
    assert logbook.flat({"a": {"b": {"c": 1}, "d": None}, "e": [2]}) == {
        "a.b.c": 1, "a.d": None, "e": [2],
    }  # fmt: skip
