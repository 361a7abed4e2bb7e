"""DVC's own commands as doors, bare: a shell without our environment, real dvc, git and Prefect."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bare import KEPT, PARAMS, SWITCHES, BareCheckout, make_bare_checkout
from tests.checkout import prefect_server


@dataclass(frozen=True, slots=True)
class After:
    """What DVC, git and MLflow say right after a door has closed."""

    said: str
    dvc: str
    git: list[str]
    logged: list[dict[str, Any]]
    files: dict[str, str]


def after(checkout: BareCheckout, *command: str) -> After:
    """Through a door, and look around."""
    said, status = checkout.dvc(*command), checkout.dvc("status")
    git = checkout.git("status", "--short")
    return After(said, status, git, checkout.logged(), checkout.files())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, server: str) -> BareCheckout:
    return make_bare_checkout(tmp_path_factory.mktemp("bare") / "project", server)


@pytest.fixture(scope="module")
def first(checkout: BareCheckout) -> After:
    """`dvc repro` from nothing; then dvc.lock is committed."""
    told = after(checkout, "repro")
    checkout.git("add", "dvc.lock")
    checkout.git("commit", "-qm", "results")
    return told


def test_repro_runs_what_is_there_to_run_and_changes_only_the_lock(first):
    for stage in KEPT:
        assert f"{stage}@smoke: done" in first.said
    assert "up to date" in first.dvc
    assert first.git == ["?? dvc.lock"]
    assert len(first.files) == 9
    assert len(first.logged) == 1


def test_repro_runs_nothing_twice(checkout, first):
    again = after(checkout, "repro")
    assert again.said.count("didn't change, skipping") == len(KEPT)
    assert again == After(again.said, first.dvc, [], first.logged, first.files)


def test_what_a_stage_wrote_is_on_disk_once(checkout, first):
    artifacts, cache = checkout.path / "artifacts", checkout.path / ".dvc/cache"
    kept = {file.stat().st_ino: file for file in cache.rglob("*") if file.is_file()}
    written = [file for file in artifacts.rglob("*") if file.is_file()]
    assert {file.stat().st_ino for file in written} <= set(kept)
    assert all(file.stat().st_nlink >= 2 and not file.stat().st_mode & 0o222 for file in written)
    lists = sum(file.stat().st_size for file in kept.values()) - 1_200_000
    assert lists < 20_000  # DVC's own lists of files, and the small artefacts


def test_a_file_that_was_edited_in_place_is_told_and_made_again(checkout, first):
    file = checkout.artifact("train") / "out.json"
    if os.geteuid():  # whom the file's mode does not stop
        file.chmod(0o644)
    with file.open("a") as opened:
        opened.write("edited\n")
    assert "modified:           artifacts/smoke/train" in checkout.dvc("status")
    # Without this, root's `dvc repro` would bring back the edited file, even with --force.
    assert checkout.run("python", "-m", "flows", "gc", "--damaged").returncode == 0
    assert "train@smoke: done" in checkout.dvc("repro", "train@smoke")
    assert checkout.files() == first.files
    assert "up to date" in checkout.dvc("status")
    assert checkout.git("status", "--short") == []


def test_a_stage_brings_the_switches_and_no_library_that_it_may_not_need(checkout, first):
    door = json.loads((checkout.path / ".work/door.json").read_text())
    assert SWITCHES.items() <= door["environment"].items()
    assert not {"torch", "transformers", "mlflow", "matplotlib", "pyarrow"} & set(door["modules"])
    assert door["cpu_seconds"] < 6  # measured 2.7 on a machine of 2 cores


def test_no_tool_asks_for_a_host_beyond_this_machine(checkout, first):
    assert "core.analytics=false" in checkout.dvc("config", "--list")
    ask = "from prefect.settings import get_current_settings as s; print(s().server.{})"
    analytics = checkout.run("python", "-c", ask.format("analytics_enabled"))
    assert analytics.stdout.strip() == "False"
    seen = checkout.hosts.read_text() if checkout.hosts.exists() else ""
    assert seen == ""
    checkout.run("python", "-c", "import socket; socket.getaddrinfo('example.org', 80)")
    assert checkout.hosts.read_text() == "example.org\n"  # the listener does listen
    checkout.hosts.unlink()


@pytest.fixture(scope="module")
def tried(checkout: BareCheckout, first: After) -> After:
    """`dvc exp run` in the workspace."""
    return after(checkout, "exp", "run", "-n", "tried", "-S", f"{PARAMS}:tokenize.mode=document")


@pytest.fixture(scope="module")
def aside(checkout: BareCheckout, tried: After) -> After:
    """`dvc exp run --temp`, with what was tried put back."""
    checkout.git("checkout", "-q", ".")
    checkout.dvc("checkout")
    change = f"{PARAMS}:query.damping.ratio=0.01"
    return after(checkout, "exp", "run", "--temp", "-n", "aside", "-S", change)


@pytest.mark.doors
def test_an_experiment_in_the_workspace_stays_there_and_is_logged(checkout, first, tried):
    assert "'train@smoke' didn't change" in tried.said
    assert "up to date" in tried.dvc
    assert tried.git == [" M dvc.lock", " M params/smoke.yaml"]
    assert len(tried.logged) == 2
    assert tried.logged[0]["dvc.exp"] == "tried"
    changed = {file for file in first.files if tried.files[file] != first.files[file]}
    assert {Path(file).name for file in changed} == {"large.txt", "metrics.json"}


@pytest.mark.doors
def test_an_experiment_aside_leaves_the_workspace_alone_and_is_logged_in_it(first, aside):
    assert "'tokenize@smoke' didn't change" in aside.said
    assert "up to date" in aside.dvc
    assert (aside.git, aside.files) == ([], first.files)
    assert len(aside.logged) == 3
    assert (aside.logged[0]["dvc.exp"], aside.logged[0]["ratio"]) == ("aside", 0.01)


@pytest.mark.doors
def test_experiments_are_shown_and_compared(checkout, aside, tmp_path):
    shown = json.loads(checkout.dvc("exp", "show", "--json"))
    (base,) = [each for each in shown if each["experiments"]]
    told = {each["name"]: each["revs"][0]["data"] for each in base["experiments"]}
    assert set(told) == {"tried", "aside"}
    assert told["aside"]["params"][PARAMS]["data"]["query"]["damping"] == {"ratio": 0.01}
    assert told["tried"]["params"][PARAMS]["data"]["tokenize"]["mode"] == "document"
    metrics = "artifacts/smoke/validate/metrics.json"
    assert told["tried"]["metrics"][metrics]["data"]["size"] == 2_400_000
    compared = json.loads(checkout.dvc("metrics", "diff", "HEAD", "aside", "--json"))
    assert compared[metrics]["ratio"]["new"] == 0.01
    compared = json.loads(checkout.dvc("params", "diff", "HEAD", "aside", "--json"))
    assert compared[PARAMS]["query.damping.ratio"]["new"] == 0.01
    page = tmp_path / "plots"
    checkout.dvc("plots", "diff", "HEAD", "tried", "-o", str(page))
    assert len(list(page.glob("static/*_spectra.png"))) == 2
    assert "http" not in (page / "index.html").read_text()


@pytest.mark.doors
def test_gc_of_the_cache_keeps_what_workspace_commits_and_experiments_have(checkout, first, aside):
    collect = ("python", "-m", "flows", "gc", "--cache")
    kept = cached(checkout)
    assert checkout.run(*collect).returncode == 0
    assert cached(checkout) == kept
    checkout.dvc("exp", "remove", "tried")
    listed = checkout.run(*collect, "--dry-run").stdout
    assert ".dvc/cache/files/md5  3 files, 2.4 MB  (in no commit or experiment)" in listed
    assert "2.4 MB would be free" in listed
    assert cached(checkout) == kept
    assert "2.4 MB freed" in checkout.run(*collect).stdout
    assert len(kept - cached(checkout)) == 3
    assert "0.01" in checkout.dvc("metrics", "diff", "HEAD", "aside")
    checkout.dvc("gc", "--workspace", "--force")
    shutil.rmtree(checkout.path / "artifacts")
    checkout.dvc("checkout")
    assert checkout.files() == first.files


def cached(checkout: BareCheckout) -> set[Path]:
    """The files of DVC's cache."""
    return set((checkout.path / ".dvc/cache/files/md5").glob("??/*"))


@pytest.mark.doors
def test_push_and_pull_bring_every_byte_back_and_compute_nothing(checkout, first, aside, tmp_path):
    checkout.dvc("remote", "add", "--local", "--default", "backup", str(tmp_path / "remote"))
    checkout.dvc("push")
    shutil.rmtree(checkout.path / "artifacts")
    shutil.rmtree(checkout.path / ".dvc/cache/files")
    checkout.dvc("pull")
    assert checkout.files() == first.files
    assert "up to date" in checkout.dvc("status")
    assert checkout.logged() == aside.logged
    assert checkout.git("status", "--short") == []
