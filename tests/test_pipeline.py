"""The run `smoke` from end to end: real stages, real processes, kill -9 in the middle."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

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
    wait_for,
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


def test_validate_logged_one_run_with_its_provenance(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.path / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    commit = finished.run("git", "rev-parse", "HEAD").stdout.strip()
    assert run.data.tags["git.commit"] == commit
    assert {"run", "stage", "dvc.out.factors", "prefect.flow_run_id"} <= set(run.data.tags)
    metrics = json.loads((finished.artifact("validate") / "metrics.json").read_text())
    assert run.data.metrics["split_half.pearson"] == metrics["split_half"]["pearson"]
    assert run.data.params["query.damping.ratio"] == "0.1"
    folders = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert folders == {"figures", "tables"}


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
        wait_for(lambda: len(checkout.shards(stage)) == 2, 120, f"two shards of {stage}")
        time.sleep(0.5)  # the files are there a moment before Prefect has noted them
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
