"""The doors, with toy stages and real processes: errors, kill -9 and resume, cache, the lock."""

import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.witness import FINAL
from tasks import store
from tests.checkout import (
    HOLD,
    Checkout,
    make_checkout,
    outlive,
    prefect_server,
    processes_below,
    stage_process,
    wait_for,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def checkout(tmp_path: Path, server: str) -> Checkout:
    return make_checkout(tmp_path / "project", server, toy=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout where no server is up: the pipeline, which ran once, lends its own."""
    checkout = make_checkout(tmp_path_factory.mktemp("undisturbed") / "project", toy=True)
    done = checkout.pipeline("tokenize")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


@pytest.fixture(scope="module")
def expected(undisturbed: Checkout) -> dict[str, str]:
    """The digests of an undisturbed run."""
    return {name: store.digest(undisturbed.artifact(name)) for name in ("train", "tokenize")}


def sentences(text: str) -> list[str]:
    """The lines of standard error."""
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["flows.stage", "train", "nope"], "train@nope: error: there is no params/nope.yaml"),
        (["flows.pipeline", "nope"], "pipeline: error: there is no params/nope.yaml"),
        (
            ["flows.stage", "query", "smoke"],
            "query@smoke: error: query@smoke depends on ",
        ),
        (["flows", "top", "smoke"], "flows: error: "),
    ],
)
def test_a_user_error_is_one_sentence(checkout, arguments, complaint):
    done = checkout.run("python", "-m", *arguments)
    assert done.returncode == 1
    (line,) = sentences(done.stderr)
    assert line.startswith(complaint)
    assert done.stdout == ""


def test_a_run_that_is_not_active_is_told_how_to_become_it(checkout):
    text = (checkout.path / "params/smoke.yaml").read_text()
    (checkout.path / "params/mine.yaml").write_text(text)
    for command in (["flows.stage", "train", "mine"], ["flows.pipeline", "mine"]):
        done = checkout.run("python", "-m", *command)
        assert done.returncode == 1
        assert "python -m flows activate mine" in done.stderr
    assert checkout.run("python", "-m", "flows", "activate", "mine").returncode == 0
    done = checkout.run("python", "-m", "flows", "check", "mine")
    assert done.returncode == 0
    assert "train     would run: " in done.stdout


def test_a_server_that_does_not_answer_is_named(checkout):
    alone = Checkout(checkout.path, "http://127.0.0.1:9/api")
    for command in (["flows.stage", "train", "smoke"], ["flows.pipeline", "smoke"]):
        done = alone.run("python", "-m", *command)
        assert done.returncode == 1
        (line,) = sentences(done.stderr)
        assert "PREFECT_API_URL is http://127.0.0.1:9/api, but no Prefect server" in line
        assert "make server" in line


def test_a_shard_that_fails_is_told_in_one_sentence_and_the_others_are_kept(checkout, expected):
    with checkout.flag("bad"):
        done = checkout.stage("train")
    assert done.returncode == 1
    assert sentences(done.stderr) == ["train@smoke: error: shard 1 is bad; mend it"]
    assert not checkout.artifact("train").exists()
    kept = checkout.shards("train")
    assert 1 <= len(kept) <= 3
    done = checkout.stage("train")
    assert done.returncode == 0
    assert done.stdout.count("was there already") == len(kept)
    assert store.digest(checkout.artifact("train")) == expected["train"]


def test_a_fault_of_ours_comes_with_its_traceback(checkout):
    with checkout.flag("broken"):
        done = checkout.stage("train")
    assert done.returncode == 1
    assert sentences(done.stderr)[0] == "train@smoke: error: this is our fault"
    assert "Traceback" in done.stderr
    assert "in compute" in done.stderr


def test_kill_9_of_a_stage_under_dvc_leaves_no_artefact_and_the_rerun_resumes(checkout, expected):
    command = ("dvc", "repro", "train@smoke")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        stage = stage_process(process.pid)
        assert stage is not None
        stage.kill()
        _, err = process.communicate(timeout=30)
    assert "failed to reproduce" in err
    assert not checkout.artifact("train").exists()
    first, second = checkout.shards("train")
    first.write_text("[]")  # as if the disk had lost it: what is remembered no longer fits
    done = checkout.run("dvc", "repro", "train@smoke")
    assert done.returncode == 0, done.stderr
    assert "2 was there already" in done.stdout
    assert done.stdout.count("was there already") == 1
    assert store.digest(checkout.artifact("train")) == expected["train"]
    assert not second.exists()
    assert "up to date" in checkout.run("dvc", "status", "train@smoke").stdout


def test_kill_9_of_the_pipeline_ends_what_it_started_and_the_rerun_resumes(checkout, expected):
    command = ("python", "-m", "flows.pipeline", "smoke", "--until", "tokenize")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        below = processes_below(process.pid)
        assert stage_process(process.pid) in below
        refused = checkout.pipeline("train")
        assert refused.returncode == 1
        assert f"another pipeline (process {process.pid}) is at work" in refused.stderr
        process.kill()
        process.communicate()
        assert not outlive(below, 10)
    done = checkout.pipeline("tokenize")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("was there already") == 2
    for stage, digest in expected.items():
        assert store.digest(checkout.artifact(stage)) == digest


def test_an_interrupt_ends_the_pipeline_and_what_it_started(checkout):
    command = ("python", "-m", "flows.pipeline", "smoke", "--until", "train")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        below = processes_below(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "run the same command to go on" in err
    assert not outlive(below, 5)


@pytest.mark.parametrize(
    ("sent", "statuses"), [(signal.SIGINT, {130}), (signal.SIGTERM, {143, -15})]
)
def test_a_signal_ends_a_stage_in_the_middle_of_a_shard(checkout, sent, statuses):
    command = ("python", "-m", "flows.stage", "train", "smoke")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        process.send_signal(sent)
        _, err = process.communicate(timeout=10)
    assert process.returncode in statuses, err
    assert "train@smoke: stopped; finished shards are kept" in err
    assert len(checkout.shards("train")) == 2


def test_the_pipeline_runs_only_what_changed_and_restores_what_was_there(checkout, expected):
    first = checkout.pipeline("tokenize")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[-1] == str(checkout.artifact("tokenize"))
    second = checkout.pipeline("tokenize")
    assert second.stdout.count(": cached") == 2
    assert "done in" not in second.stdout

    checkout.edit("params/smoke.yaml", "mode: pack", "mode: document")
    checkout.edit("params/smoke.yaml", "workers: 2", "workers: 1")
    third = checkout.pipeline("tokenize")
    assert third.stdout.count(": cached") == 1
    assert "tokenize@smoke: runs (changed deps: params/smoke.yaml" in third.stdout
    assert store.digest(checkout.artifact("tokenize")) != expected["tokenize"]

    checkout.edit("params/smoke.yaml", "mode: document", "mode: pack")
    fourth = checkout.pipeline("tokenize")
    assert "is cached - skipping run" in fourth.stdout
    assert "tokenize@smoke: done" not in fourth.stdout
    assert store.digest(checkout.artifact("tokenize")) == expected["tokenize"]
    assert "didn't change, skipping" in checkout.run("dvc", "repro", "tokenize@smoke").stdout


def test_a_stage_that_fails_stops_the_pipeline_with_its_message(checkout):
    with checkout.flag("bad"):
        done = checkout.pipeline("tokenize")
    assert done.returncode == 1
    assert "pipeline: stopped: train@smoke: error: shard 1 is bad; mend it" in done.stderr
    assert "tokenize" not in done.stdout


def runs(server: str, kind: str) -> list[dict[str, Any]]:
    """All flow or task runs that a server knows."""
    request = urllib.request.Request(
        f"{server}/{kind}_runs/filter", b"{}", {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_a_stage_that_is_killed_is_shown_as_crashed_below_the_task_that_failed(checkout, server):
    before = {each["id"] for kind in ("flow", "task") for each in runs(server, kind)}
    command = ("python", "-m", "flows.pipeline", "smoke", "--until", "train")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        stage = stage_process(process.pid)
        assert stage is not None
        stage.kill()
        _, err = process.communicate(timeout=30)
    assert "train@smoke: error: its process was killed (signal 9)" in err

    def new(kind: str) -> list[dict[str, Any]]:
        return [each for each in runs(server, kind) if each["id"] not in before]

    def states() -> dict[str, str]:
        return {each["name"]: each["state_type"] for each in new("flow")}

    wanted = {"smoke until train": "FAILED", "train@smoke": "CRASHED"}
    wait_for(lambda: states() == wanted, 15, f"{wanted}")
    flows, tasks = new("flow"), new("task")
    pipeline = next(each for each in flows if each["name"] == "smoke until train")
    child = next(each for each in flows if each["name"] == "train@smoke")
    task = next(each for each in tasks if each["id"] == child["parent_task_run_id"])
    assert task["flow_run_id"] == pipeline["id"]

    def still_open() -> list[str]:
        return [each["name"] for each in new("task") if each["state_type"] not in FINAL]

    wait_for(lambda: not still_open(), 30, "every task run to be final")


def test_a_pipeline_without_a_server_leaves_none_behind_when_it_is_killed(undisturbed, expected):
    undisturbed.edit("tasks/train.py", '"""Toy stage."""', '"""Toy stage, changed."""')
    command = ("python", "-m", "flows.pipeline", "smoke", "--until", "train")
    with undisturbed.flag(HOLD), undisturbed.started(*command) as process:
        undisturbed.wait_held("train")
        below = processes_below(process.pid)
        assert any("uvicorn" in each.cmdline() for each in below)
        process.kill()
        process.wait()
        assert not outlive(below, 10)
    assert store.digest(undisturbed.artifact("tokenize")) == expected["tokenize"]
