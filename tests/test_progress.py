"""Progress: what is told of a map of shards, and the bar in Prefect's UI."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import progressbar, store
from tasks.params import load_params
from tasks.progress import Progress, duration
from tasks.runners import task_runner
from tasks.shards import ShardRef, bar_key, map_shards, split, watched
from tasks.workspace import StageContext, prepare
from tests.checkout import prefect_server


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_progress_tells_done_of_all_speed_and_time_left(clock):
    lines: list[str] = []
    progress = Progress("factors shard", [10, 30, 60], lines.append, clock, "sequences")
    for clock.now, index in ((2.0, 1), (3.0, 0), (10.0, 2)):
        progress.shard_done(index, cached=index == 1)
    assert lines == [
        "factors shard: 1 of 3 shards, 30 of 100 sequences; shard 2 was there already",
        "factors shard: 2 of 3 shards, 40 of 100 sequences, 3.33 sequences/s, 18 s left",
        "factors shard: 3 of 3 shards, 100 of 100 sequences, 7 sequences/s, 0.0 s left",
    ]


def test_ticks_count_at_once_and_never_twice(clock):
    progress = Progress("eigen shard", [10, 30], [].append, clock, "factors")
    assert progress.standing() == (0, 0.0, "0 of 40 factors")
    clock.now = 2.0
    progress.tick(1, 8)
    assert progress.standing() == (8, 20.0, "8 of 40 factors, 4 factors/s, 8.0 s left")
    progress.tick(1, 8)
    progress.tick(1, 30)  # a shard that is tried again counts from its start
    assert progress.standing()[0] == 30
    progress.shard_done(1, cached=False)
    progress.shard_done(0, cached=True)
    assert progress.standing() == (40, 100.0, "40 of 40 factors, 15 factors/s, 0.0 s left")


def test_items_that_were_done_before_do_not_count_for_the_speed(clock):
    lines: list[str] = []
    progress = Progress("train steps", [100], lines.append, clock, "steps")
    progress.tick(0, 90, cached=True)  # a training that goes on
    assert progress.standing() == (90, 90.0, "90 of 100 steps")
    clock.now = 10.0
    progress.tick(0, 5)
    assert progress.standing() == (95, 95.0, "95 of 100 steps, 0.5 steps/s, 10 s left")
    clock.now = 20.0
    progress.shard_done(0, cached=False)
    assert lines == ["train steps: 1 of 1 shards, 100 of 100 steps, 0.5 steps/s, 0.0 s left"]


def test_a_long_shard_is_not_silent(clock):
    lines: list[str] = []
    progress = Progress("stream shard", [1000, 1000], lines.append, clock, "sequences")
    for clock.now in range(60):
        progress.tick(0, 10 if clock.now > 5 else 0)
        progress.tell_if_quiet()
    assert len(lines) == 5
    assert (
        lines[0]
        == "stream shard: 0 of 2 shards, 50 of 2000 sequences, 5 sequences/s, 6 min 30 s left"
    )
    clock.now = 100.0
    progress.tell_if_quiet()
    progress.tell_if_quiet()
    assert len(lines) == 6
    clock.now = 200.0
    progress.tell_if_quiet()  # nothing was done since
    assert len(lines) == 6


def test_durations_are_for_people():
    told = [duration(seconds) for seconds in (0.04, 9.94, 48.4, 200, 7500)]
    assert told == ["0.0 s", "9.9 s", "48 s", "3 min 20 s", "2 h 5 min"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def context(tmp_path: Path, root: Path) -> StageContext:
    context = StageContext("my_run", "factors", load_params(root, "smoke"), tmp_path, "f" * 64)
    prepare(context)
    return context


def sleepy(context: StageContext, shard: ShardRef, path: Path) -> None:
    for _ in shard.counted():
        time.sleep(0.02)
    store.write_json(path, list(shard.items))


def mapped(context: StageContext, url: str, compute=sleepy) -> list[Path]:
    """`map_shards` as in a stage's flow."""
    from prefect import flow
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    def stage() -> list[Path]:
        return map_shards(context, compute, split(60, 3), suffix=".json")

    runner = task_runner(context.params.runtime)
    settings = {PREFECT_API_URL: url, PREFECT_HOME: context.root / "home"}
    # Lines that are still on their way to a server which is gone hold up the end of the tests.
    with temporary_settings({**settings, PREFECT_LOGGING_TO_API_ENABLED: False}):
        return flow(name="stage", task_runner=runner, persist_result=False)(stage)()


def test_work_that_goes_on_tells_no_speed_of_what_it_found(context, capsys):
    with watched(context, "steps", 100) as tick:
        tick(100, cached=True)
    assert capsys.readouterr().out == "factors steps: 1 of 1 shards, 100 of 100 steps\n"


@pytest.mark.doors
def test_prefect_shows_a_bar_that_moves_within_shards_and_ends_full(context, server, monkeypatch):
    from prefect import artifacts
    from prefect.client.orchestration import get_client

    shown: list[float] = []

    def update(artifact_id, progress, description):
        shown.append(progress)
        return sent(artifact_id, progress, description)

    sent = artifacts.update_progress_artifact
    monkeypatch.setattr(artifacts, "update_progress_artifact", update)
    monkeypatch.setattr(progressbar, "SECONDS", 0.1)
    mapped(context, server)
    assert shown == sorted(set(shown))
    assert len(shown) >= 3
    assert any(percent % (100 / 3) > 1 for percent in shown)
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        (bar,) = client.read_artifacts()
        run = client.read_flow_run(bar.flow_run_id)
    assert (bar.key, bar.type, bar.data) == ("my-run-factors", "progress", 100.0)
    assert bar_key(context) == bar.key
    assert bar.description.startswith("60 of 60 sequences, ")
    assert bar.description.endswith(" sequences/s, 0.0 s left")
    assert run.state.is_completed()


def test_a_server_that_refuses_the_bar_never_stops_the_work(monkeypatch, capsys):
    from prefect import artifacts

    asked: list[float] = []

    def refuse(percent, **_named):
        asked.append(percent)
        raise OSError("database is locked")

    monkeypatch.setattr(artifacts, "create_progress_artifact", refuse)
    monkeypatch.setattr(progressbar, "SECONDS", 0.02)
    progress = Progress("factors shard", [4], [].append)
    with progressbar.kept_bar(progress, "my-run-factors"):
        for _ in range(4):
            progress.tick(0, 1)
            time.sleep(0.05)
    assert len(asked) > 1
    assert asked[-1] == 100.0
    assert capsys.readouterr().out.splitlines() == [
        "the progress bar in Prefect's UI stands still (database is locked); the work goes on"
    ]


def test_who_listened_may_go_and_the_work_goes_on():
    """A worker that is killed leaves a broken pipe as the standard output of what it had begun."""
    code = (
        "import sys; from tasks.progress import say\n"
        "sys.stdin.readline()\n"
        "for _ in range(3): say('a line')\n"
        "sys.stderr.write('to the end')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        assert process.stderr.read() == "to the end"
    assert process.returncode == 0
