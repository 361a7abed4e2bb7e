"""The run `smoke` from end to end: real stages, real processes, kill -9 in the middle."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks import store
from tasks.workspace import STAGES
from tests.checkout import (
    HOLD,
    Checkout,
    make_checkout,
    prefect_server,
    stage_process,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: str) -> Checkout:
    """A checkout in which the whole pipeline has run, once and undisturbed."""
    checkout = make_checkout(tmp_path_factory.mktemp("finished") / "project", server)
    done = checkout.run("python", "-m", "flows.pipeline", "smoke", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = checkout.artifact("report") / "index.html"
    assert done.stdout.splitlines()[-1] == str(report)
    assert report.is_file()
    return checkout


def test_after_a_run_dvc_is_clean_and_git_sees_only_the_lock(finished):
    for stage in STAGES:
        assert finished.artifact(stage).is_dir()
    status = finished.run("dvc", "status", "report@smoke", "--with-deps")
    assert "up to date" in status.stdout, status.stdout
    assert finished.run("git", "status", "--short").stdout.split() == ["??", "dvc.lock"]
    assert not [path for path in (finished.path / ".work").iterdir() if path.is_dir()]


def test_every_file_that_a_stage_wrote_is_kept_by_dvc(finished):
    lock = finished.run("dvc", "ls", "--dvc-only", "--recursive", ".", "artifacts/smoke")
    kept = set(lock.stdout.split())
    root = finished.path / "artifacts/smoke"
    assert kept == {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def test_the_second_time_nothing_is_computed(finished):
    done = finished.run("python", "-m", "flows.pipeline", "smoke")
    assert done.returncode == 0
    assert done.stdout.count(": cached") == len(STAGES)
    assert "didn't change" in finished.run("dvc", "repro", "report@smoke").stdout


def logged_runs(checkout: Checkout) -> tuple[Any, list[Any]]:
    """A client of the checkout's MLflow store, and its runs, the newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{checkout.path / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return client, client.search_runs(experiments)


def test_validate_logged_one_run_with_its_provenance(finished):
    client, [run] = logged_runs(finished)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "smoke ratio=0.1 rank=8")
    tags, lock = run.data.tags, YAML().load(finished.path / "dvc.lock")["stages"]
    corpus = "data/tinystories/first1000.jsonl.gz"
    commit = finished.run("git", "rev-parse", "HEAD").stdout.strip()
    digests = {
        f"dvc.out.{stage}": lock[f"{stage}@smoke"]["outs"][0]["md5"]
        for stage in STAGES[: STAGES.index("validate")]
    }
    [digests[f"dvc.in.{corpus}"]] = [
        dep["md5"] for dep in lock["tokenize@smoke"]["deps"] if dep["path"] == corpus
    ]
    wanted = {"run": "smoke", "stage": "validate", "git.commit": commit, "git.dirty": "false"}
    wanted |= {"prefect.flow_run_name": "validate@smoke", **digests}
    assert {key: tags.get(key) for key in wanted} == wanted
    assert tags["prefect.url"].endswith(tags["prefect.flow_run_id"])

    metrics = store.read_json(finished.artifact("validate") / "metrics.json")
    found = run.data.metrics
    assert found["split_half/pearson"] == metrics["split_half"]["pearson"]
    assert found["baselines/bm25.spearman"] == metrics["baselines"]["bm25"]["spearman"]
    for layer, measured in metrics["layers"].items():
        assert found[f"split_half_by_layer/{layer}"] == measured["split_half"]
    assert run.data.params["query.damping.ratio"] == "0.1"

    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (corpus, digests[f"dvc.in.{corpus}"])
    factors = client.get_model_version_by_alias("smoke-factors", "current")
    assert factors.source == f"dvc://artifacts/smoke/factors?md5={digests['dvc.out.factors']}"
    assert factors.run_id == run.info.run_id


def test_the_report_is_in_the_run_of_what_it_reports(finished, tmp_path):
    client, [run] = logged_runs(finished)
    folders = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert folders == {"figures", "tables", "report"}
    page = client.download_artifacts(run.info.run_id, "report/index.html", str(tmp_path))
    assert store.digest(Path(page)) == store.digest(finished.artifact("report") / "index.html")


@pytest.mark.doors
def test_a_store_that_is_not_there_costs_no_result_and_can_be_told_later(finished):
    before = store.digest(finished.artifact("validate"))
    repeat = ("dvc", "repro", "--force", "--single-item")
    nowhere = ("env", "MLFLOW_TRACKING_URI=http://127.0.0.1:9")
    done = finished.run(*nowhere, *repeat, "validate@smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validate@smoke: WARNING: not logged to MLflow" in done.stdout
    command = " ".join((*repeat, "validate@smoke", "report@smoke"))
    assert f"`{command}`" in done.stdout
    assert store.digest(finished.artifact("validate")) == before
    assert len(logged_runs(finished)[1]) == 1

    done = finished.run(*command.split())
    assert done.returncode == 0, done.stdout + done.stderr
    client, [again, _] = logged_runs(finished)
    assert {file.path for file in client.list_artifacts(again.info.run_id)} >= {"report"}
    assert "up to date" in finished.run("dvc", "status", "report@smoke").stdout


def test_top_prints_a_line_for_each_top_sequence(finished):
    done = finished.run("python", "-m", "flows", "top", "smoke")
    assert done.returncode == 0, done.stderr
    rows = store.read_table(finished.artifact("score") / "top.parquet", ["sequence"])
    for sequence in rows["sequence"].to_pylist():
        assert f"  {sequence}" in done.stdout
    assert (
        "no query named like 'zzz'"
        in finished.run("python", "-m", "flows", "top", "smoke", "zzz").stderr
    )


def test_another_damping_refits_nothing(finished):
    params = finished.path / "params/smoke.yaml"
    text = params.read_text()
    params.write_text(text.replace("ratio: 0.1", "ratio: 0.2"))
    try:
        told = finished.run("python", "-m", "flows", "check", "smoke").stdout
    finally:
        params.write_text(text)
    states = dict(line.split(maxsplit=1) for line in told.splitlines()[1:])
    for stage in ("train", "tokenize", "filter", "factors", "eigen", "correct"):
        assert states[stage] == "is up to date"
    assert states["query"].startswith("would run: changed deps: params/smoke.yaml")
    for stage in ("stream", "score", "validate", "report"):
        assert "run" in states[stage]


@pytest.fixture
def disturbed(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout in which, for DVC, nothing from `factors` on ever ran."""
    path = tmp_path / "project"
    shutil.copytree(finished.path, path, copy_function=shutil.copy)
    shutil.rmtree(path / ".dvc/cache/runs")
    yaml = YAML()
    lock = yaml.load(path / "dvc.lock")
    for stage in STAGES[STAGES.index("factors") :]:
        shutil.rmtree(path / "artifacts/smoke" / stage)
        del lock["stages"][f"{stage}@smoke"]
    yaml.dump(lock, path / "dvc.lock")
    return Checkout(path, finished.server)


def kill_in(checkout: Checkout, stage: str) -> None:
    """Kill -9 the stage when it has finished two shards; the pipeline stops and says so."""
    command = ("python", "-m", "flows.pipeline", "smoke", "--until", stage)
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held(stage)
        found = stage_process(process.pid)
        assert found is not None
        found.kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "run the same command to go on" in err
    assert not checkout.artifact(stage).exists()


def test_kill_9_in_factors_and_in_stream_changes_no_byte_of_the_result(finished, disturbed):
    kill_in(disturbed, "factors")
    resumed = disturbed.pipeline("query")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed.stdout.count("was there already") == 2
    kill_in(disturbed, "stream")
    resumed = disturbed.pipeline("score")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed.stdout.count("was there already") == 2
    for stage in STAGES[: STAGES.index("score") + 1]:
        for file in sorted(finished.artifact(stage).rglob("*")):
            if file.is_file():
                name = file.relative_to(finished.artifact(stage))
                again = disturbed.artifact(stage) / name
                assert store.digest(again) == store.digest(file), f"{stage}/{name}"
