"""Prefect's UI as a door, beside `dvc repro`: a real server, a real worker, runs made over REST.

One checkout with toy stages for the whole file; every test leaves it up to date. The tests speak to
the server as the pages in a browser do.
"""

import contextlib
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks import store
from tasks.active import load_active
from tasks.workspace import STAGES
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

pytestmark = pytest.mark.doors
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
AFTER_QUERY = STAGES[STAGES.index("query") :]


class Station:
    """A checkout with a worker, seen through the server's API."""

    def __init__(self, checkout: Checkout, api: str) -> None:
        self.checkout, self.api = checkout, api

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.api + path, data, {"Content-Type": "application/json"}
        )
        for delay in (1, 2, 4, 8, 16, None):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or delay is None:  # SQLite is busy: the UI asks again too
                    raise
                time.sleep(delay)

    def start(self, door: str = "pipeline", **parameters: Any) -> str:
        """A run of a deployment, as the UI's form makes one; its id."""
        deployment = self.call(f"/deployments/name/{door}/{door}")["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.call(f"/deployments/{deployment}/create_flow_run", body)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.call(f"/flow_runs/{run}")["state"]

    def ended(self, run: str, seconds: float = 300) -> dict[str, Any]:
        wait_for(lambda: self.state(run)["type"] in FINAL, seconds, f"the end of flow run {run}")
        return self.state(run)

    def done(self, door: str = "pipeline", **parameters: Any) -> dict[str, str]:
        """A run to its good end: how each stage ended, by stage."""
        run = self.start(door, **parameters)
        state = self.ended(run)
        assert state["type"] == "COMPLETED", state["message"]
        return self.stages(run)

    def tasks(self, run: str) -> list[dict[str, Any]]:
        return self.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})

    def stages(self, run: str) -> dict[str, str]:
        """The name of the state of each stage of a pipeline's run."""
        return {task["name"].split("@")[0]: task["state_name"] for task in self.tasks(run)}

    def children(self, run: str) -> list[dict[str, Any]]:
        """The flow runs of stages below a pipeline's run."""
        parents = {"parent_flow_run_id": {"any_": [run]}}
        return self.call("/flow_runs/filter", {"flow_runs": parents})

    def held_in(self, stage: str, run: str) -> None:
        """Wait until a stage has finished two shards and hangs in the third."""
        self.checkout.wait_held(stage)
        assert self.state(run)["type"] == "RUNNING"

    def flow_process(self, run: str) -> psutil.Process:
        """The process in which a worker runs a flow run: the first of those that know of it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                    found.append(process)
        return min(found, key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """A checkout in which `dvc repro` has made everything, and then a worker began."""
    with prefect_server(tmp_path_factory.mktemp("server")) as api:
        ui = api.removesuffix("/api")
        path = tmp_path_factory.mktemp("station") / "project"
        checkout = make_checkout(path, api, toy=True)
        checkout = Checkout(path, api, {"INFLUENCE_PREFECT_URL": ui})
        git(checkout, "add", ".")
        git(checkout, "commit", "-qm", "start")
        done = checkout.run("dvc", "repro", "report@smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        git(checkout, "add", "dvc.lock")
        git(checkout, "commit", "-qm", "lock")
        with worker(checkout):
            yield Station(checkout, api)


@contextlib.contextmanager
def worker(checkout: Checkout) -> Iterator[psutil.Process]:
    command = ("python", "-m", "flows", "serve", "worker")
    with checkout.started(*command) as process:
        assert process.stdout is not None
        line = ""
        while "started!" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
        yield psutil.Process(process.pid)


def git(checkout: Checkout, *arguments: str) -> str:
    command = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments)
    done = checkout.run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests(checkout: Checkout) -> dict[str, str]:
    return {stage: store.digest(checkout.artifact(stage)) for stage in STAGES}


def assert_up_to_date(checkout: Checkout, changed: str = "") -> None:
    """DVC has nothing to do, and git sees only what was meant."""
    repro = checkout.run("dvc", "repro", "report@smoke")
    assert repro.stdout.count("didn't change, skipping") >= len(STAGES) - 1, repro.stdout
    assert "Running stage" not in repro.stdout
    assert "up to date" in checkout.run("dvc", "status", "report@smoke", "--with-deps").stdout
    assert git(checkout, "status", "--short").strip() == changed


def test_the_deployments_have_descriptions_tags_and_one_slot(station):
    found = {each["name"]: each for each in station.call("/deployments/filter", {})}
    benchmarks = {f"validate-{name}" for name in load_active(station.checkout.path).benchmarks}
    assert set(found) == {"pipeline", "validate", "queries", *benchmarks}
    for each in found.values():
        assert each["description"]
        assert "influence" in each["tags"]
        assert each["global_concurrency_limit"]["limit"] == 1
        assert each["enforce_parameter_schema"]
    assert station.call("/v2/concurrency_limits/gpu")["limit"] == 1


def test_after_dvc_repro_a_run_from_the_ui_finds_everything_cached(station):
    before = digests(station.checkout)
    assert station.done(run="smoke") == dict.fromkeys(STAGES, "Cached")
    assert digests(station.checkout) == before
    assert_up_to_date(station.checkout)


def test_an_override_runs_what_it_concerns_and_the_old_value_comes_from_the_cache(station):
    before = digests(station.checkout)
    stages = station.done(run="smoke", changes={"damping_ratio": 0.25})
    ran = {stage for stage, state in stages.items() if state == "Completed"}
    assert ran == set(AFTER_QUERY)
    assert digests(station.checkout)["stream"] != before["stream"]
    assert_up_to_date(station.checkout, "M dvc.lock\n M params/smoke.yaml")
    stages = station.done(run="smoke", changes={"damping_ratio": 0.1})
    assert stages == dict.fromkeys(STAGES, "Cached")
    assert digests(station.checkout) == before
    assert_up_to_date(station.checkout)


def test_a_value_that_does_not_fit_is_refused_before_anything_is_written(station):
    run = station.start(run="smoke", changes={"top": 2})
    state = station.ended(run)
    assert state["type"] == "FAILED"
    assert "report.top 3 is more than score.top 2" in state["message"]
    assert git(station.checkout, "status", "--short") == ""
    with pytest.raises(urllib.error.HTTPError, match="409"):
        station.start(run="smoke", changes={"rank": 0})
    with pytest.raises(urllib.error.HTTPError, match="409"):
        station.start(run="no-such-run")


@pytest.fixture
def stale_stream(station: Station) -> Iterator[dict[str, str]]:
    """`stream` must run again, to the same result; what it was."""
    station.checkout.run("dvc", "repro", "report@smoke")  # whatever the test before this one left
    file = station.checkout.path / "tasks/stream.py"
    text, before = file.read_text(), digests(station.checkout)
    file.write_text(text + f"# {time.monotonic()}: says nothing new\n")
    yield before
    assert digests(station.checkout) == before
    file.write_text(text)
    assert station.checkout.run("dvc", "repro", "report@smoke").returncode == 0
    git(station.checkout, "checkout", "dvc.lock")
    assert_up_to_date(station.checkout)


def dvc_process(station: Station) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "repro" in line and process.cwd() == str(station.checkout.path):
                return process
    raise AssertionError("no dvc at work")


@pytest.mark.parametrize("victim", ["stage", "dvc", "flow"])
def test_kill_9_mid_stream_is_shown_and_the_rerun_resumes(station, stale_stream, victim):
    checkout = station.checkout
    with checkout.flag(HOLD):
        run = station.start(run="smoke")
        station.held_in("stream", run)
        flow = station.flow_process(run)
        below = [flow, *processes_below(flow.pid)]
        stage = stage_process(flow.pid)
        assert stage is not None
        {"stage": stage, "dvc": dvc_process(station), "flow": flow}[victim].kill()
        state = station.ended(run, 60)
        assert not outlive(below, 10)
    assert state["type"] == ("CRASHED" if victim == "flow" else "FAILED")
    (child,) = (each for each in station.children(run) if each["name"] == "stream@smoke")
    wait_for(lambda: station.state(child["id"])["type"] == "CRASHED", 10, "the stage's crash")
    states = {each["state_type"] for each in station.tasks(child["id"])}
    assert states <= FINAL
    if victim == "dvc":  # by the other door
        done = checkout.run("dvc", "repro", "report@smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        told = done.stdout
    else:  # the button Retry
        state = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
        station.call(f"/flow_runs/{run}/set_state", state)
        state = station.ended(run)
        assert state["type"] == "COMPLETED", state
        logs = station.call("/logs/filter", {"limit": 200, "sort": "TIMESTAMP_DESC"})
        told = "\n".join(line["message"] for line in logs if line["flow_run_id"] == run)
    assert told.count("stream shard") >= 4
    assert told.count("was there already") == 2


def test_cancel_ends_every_process_and_the_next_run_is_fine(station, stale_stream):
    with station.checkout.flag(HOLD):
        run = station.start(run="smoke")
        station.held_in("stream", run)
        flow = station.flow_process(run)
        below = [flow, *processes_below(flow.pid)]
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        station.call(f"/flow_runs/{run}/set_state", state)
        asked = time.monotonic()
        assert not outlive(below, 30)
        took = time.monotonic() - asked
    assert station.ended(run, 30)["type"] == "CANCELLED"
    assert took < 10
    (child,) = (each for each in station.children(run) if each["name"] == "stream@smoke")
    wait_for(lambda: station.state(child["id"])["type"] in FINAL, 10, "the stage's end")
    stages = station.done(run="smoke")
    assert stages["stream"] == "Completed"


def test_dvc_repro_during_a_run_from_the_ui_is_refused_and_does_no_harm(station, stale_stream):
    with station.checkout.flag(HOLD):
        run = station.start(run="smoke")
        station.held_in("stream", run)
        refused = station.checkout.run("dvc", "repro", "report@smoke")
        assert refused.returncode != 0
        assert "is busy, it is being blocked by" in refused.stderr
        again = station.checkout.pipeline("stream")
        assert again.returncode == 1
        assert "another pipeline" in again.stderr
        second = station.start(run="smoke")
        time.sleep(3)
        assert station.state(second)["type"] in ("SCHEDULED", "PENDING")
    assert station.ended(run)["type"] == "COMPLETED"
    assert station.ended(second)["type"] == "COMPLETED"
    assert set(station.stages(second).values()) == {"Cached"}


def test_a_run_from_the_ui_during_dvc_repro_is_refused_with_what_to_do(station, stale_stream):
    checkout = station.checkout
    with checkout.flag(HOLD), checkout.started("dvc", "repro", "report@smoke") as process:
        checkout.wait_held("stream")
        state = station.ended(station.start(run="smoke"))
        assert state["type"] == "FAILED"
        assert "DVC is at work" in state["message"]
        (checkout.path / HOLD).unlink()
        process.communicate(timeout=120)
        (checkout.path / HOLD).touch()
    assert process.returncode == 0


def test_a_killed_worker_loses_nothing(station, stale_stream):
    """The run that it had begun goes on; a new worker takes the next."""
    checkout = station.checkout
    with checkout.flag(HOLD):
        run = station.start(run="smoke")
        station.held_in("stream", run)
        flow = station.flow_process(run)
        parent = flow.parent()
        assert parent is not None
        parent.send_signal(signal.SIGKILL)
    assert station.ended(run)["type"] == "COMPLETED"
    psutil.wait_procs([flow], timeout=20)
    with worker(checkout):
        assert station.done(run="smoke") == dict.fromkeys(STAGES, "Cached")


@pytest.fixture
def second_worker(station: Station) -> Iterator[None]:
    """The one of the station may have been killed."""
    with worker(station.checkout):
        yield


@pytest.mark.usefixtures("second_worker")
def test_a_new_run_is_made_from_the_form_and_shares_the_fit(station):
    checkout = station.checkout
    stages = station.done(run="smoke", new_run="damped", changes={"damping_ratio": 0.5})
    shared = {"train", "tokenize", "factors", "eigen", "correct"}
    assert {stage for stage, state in stages.items() if state == "Cached"} == shared
    folders = {path.name for path in (checkout.path / "artifacts/damped").iterdir()}
    assert folders == set(STAGES) - shared
    form = station.call("/deployments/name/pipeline/pipeline")["parameter_openapi_schema"]
    assert form["properties"]["run"]["enum"] == ["damped", "smoke", "tinystories"]
    assert "ratio: 0.5" in (checkout.path / "params/damped.yaml").read_text()
    assert "ratio: 0.1" in (checkout.path / "params/smoke.yaml").read_text()
    assert "Running stage" not in checkout.run("dvc", "repro", "report@damped").stdout
    assert_up_to_date(checkout, "M dvc.lock\n M params/active.yaml\n?? params/damped.yaml")


@pytest.mark.usefixtures("second_worker")
def test_a_query_set_is_asked_of_a_fit_that_is_there_and_never_fits(station):
    typed = [{"name": "cat", "prompt": "The cat sat on the", "completion": " mat."}]
    stages = station.done("queries", run="smoke", name="cats", typed=typed)
    ran = {stage for stage, state in stages.items() if state == "Completed"}
    assert ran == {"filter", *AFTER_QUERY}
    asked = (station.checkout.path / "data/queries/cats.jsonl").read_text()
    assert json.loads(asked) == typed[0]
    file = station.checkout.path / "tasks/factors.py"
    text = file.read_text()
    file.write_text(text + "# not what the fit was made by\n")
    try:
        state = station.ended(station.start("queries", run="smoke", name="dogs", typed=typed))
    finally:
        file.write_text(text)
    assert state["type"] == "FAILED"
    assert "not up to date" in state["message"]
    assert not (Path(station.checkout.path) / "params/dogs.yaml").exists()


@pytest.mark.usefixtures("second_worker")
def test_what_a_run_shows(station):
    """Artifacts and logs of a run that found everything done."""
    run = station.start(run="smoke")
    assert station.ended(run)["type"] == "COMPLETED"
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    shown = {each["key"]: each for each in station.call("/artifacts/filter", asked)}
    outputs = shown["smoke-outputs"]["data"]
    for stage in STAGES:
        assert f"`artifacts/smoke/{stage}" in outputs
    assert "up to date" in outputs
    assert "/smoke/report/index.html" in shown["smoke-report"]["data"]
    edges = {
        task["name"]: {each["id"] for each in task["task_inputs"].get("wait_for", [])}
        for task in station.tasks(run)
    }
    ids = {task["name"]: task["id"] for task in station.tasks(run)}
    assert ids["query@smoke"] in edges["stream@smoke"]
    assert ids["filter@smoke"] in edges["stream@smoke"]
