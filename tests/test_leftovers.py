"""`python -m flows gc`: what goes is what nothing will use again, and only when nothing works."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import dvcstage
from tasks.leftovers import CACHE, RESULTS, damaged_cache, leftovers
from tasks.params import load_params
from tests.checkout import Checkout, make_checkout, prefect_server, wait_for
from tests.test_doors import runs

COLLECT = ("python", "-m", "flows", "gc")
SHARD = "shard-00001-of-00004.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, server: str) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("toy") / "project", server, toy=True)


@pytest.fixture
def root(toy: Checkout) -> Iterator[Path]:
    """The checkout, with a folder in which `train` would resume."""
    runtime = load_params(toy.path, "smoke").runtime
    fingerprint = dvcstage.input_fingerprint(toy.path, "train", "smoke", runtime)
    shard = write(toy.path / f".work/smoke-train-{fingerprint[:12]}/{SHARD}", "[]")
    yield toy.path
    shard.unlink()
    shutil.rmtree(toy.path / RESULTS, ignore_errors=True)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def remember(root: Path, name: str, result: object) -> Path:
    """A result as Prefect stores it."""
    told = {"metadata": {}, "result": json.dumps(result)}
    return write(root / RESULTS / name, json.dumps(told))


def found(root: Path) -> dict[str, str]:
    """Reasons by path."""
    return {str(each.path.relative_to(root)): each.reason for each in leftovers(root)}


def test_partial_results_go_unless_the_stage_would_resume_there(root):
    for name in ("smoke-train-0123456789ab", "gone-train-0123456789ab", "rubbish"):
        write(root / ".work" / name / SHARD, "[]")
    reasons = found(root)
    assert reasons.pop(".work/smoke-train-0123456789ab") == "its inputs have changed"
    assert reasons.pop(".work/gone-train-0123456789ab").startswith("there is no params/gone.yaml")
    assert reasons == {".work/rubbish": "no stage's folder"}
    for leftover in leftovers(root):
        leftover.remove()
    assert found(root) == {}
    assert len(list((root / ".work").glob(f"smoke-train-*/{SHARD}"))) == 1


def test_results_go_with_their_shards(root):
    kept = remember(root, "kept", {"file": SHARD, "digest": "1"})
    old = remember(root, "old", {"file": "other-00001-of-00004.json", "digest": "2"})
    failed = remember(root, "failed", {"__exc_type__": "builtins.ValueError", "message": "bad"})
    others = [remember(root, "number", 3), remember(root, "text", "file")]
    others.append(write(root / RESULTS / "unreadable", "{"))
    (leftover,) = leftovers(root)
    assert leftover.files == (failed, old)
    assert leftover.num_bytes == failed.stat().st_size + old.stat().st_size
    leftover.remove()
    assert all(file.is_file() for file in (kept, *others))
    assert found(root) == {}


def test_checkouts_of_killed_experiments_go(root):
    places = [".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpdef"]
    for place in places:
        write(root / place / "dvc.yaml", "stages: {}")
    write(root / ".dvc/tmp/exps/run/one/one.run", "{}")
    assert found(root) == dict.fromkeys(places, "an experiment that was killed")
    for leftover in leftovers(root):
        leftover.remove()
    assert (root / ".dvc/tmp/exps/run/one/one.run").is_file()


def test_a_cache_file_that_is_not_what_its_name_says_is_damaged(tmp_path):
    files = []
    for text in ("sound", "edited"):
        name = hashlib.md5(text.encode()).hexdigest()
        kept = write(tmp_path / CACHE / name[:2] / name[2:], text)
        file = tmp_path / "artifacts/smoke/train" / text
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(kept, file)
        files.append(kept)
    assert damaged_cache(tmp_path) == []
    (tmp_path / "artifacts/smoke/train/edited").write_text("another")
    (leftover,) = damaged_cache(tmp_path)
    assert leftover.files == (files[1],)
    assert leftover.num_bytes == 0  # the artefact keeps the bytes
    assert damaged_cache(tmp_path, Path("artifacts/smoke/tokenize")) == []


def test_nothing_goes_while_a_stage_works_anywhere_in_the_checkout(toy, root):
    wait = (sys.executable, "-c", "import time; time.sleep(60)", "flows.stage", "train")
    folder = write(root / ".dvc/tmp/exps/standalone/tmpx/dvc.yaml", "stages: {}").parent
    with subprocess.Popen(wait, cwd=folder) as process:
        done = toy.run(*COLLECT)
        process.kill()
    assert done.returncode == 1
    assert f"flows: error: process {process.pid}: " in done.stderr
    assert "is at work in" in done.stderr
    assert folder.is_dir()
    assert toy.run(*COLLECT).returncode == 0
    assert not folder.exists()


def test_a_dry_run_lists_what_a_run_then_removes(toy, root):
    write(root / ".work/rubbish/file", "x" * 200_000)
    write(root / CACHE / "ab/cdef0123456789abcdef0123456789", "x" * 300_000)
    listed = toy.run(*COLLECT, "--cache", "--dry-run").stdout.splitlines()
    assert listed == [
        ".work/rubbish  0.2 MB  (no stage's folder)",
        f"{CACHE}  1 file, 0.3 MB  (in no commit or experiment)",
        "0.5 MB would be free",
    ]
    assert (root / ".work/rubbish").is_dir()
    assert toy.run(*COLLECT, "--cache").stdout.splitlines() == [*listed[:2], "0.5 MB freed"]
    assert found(root) == {}


def test_a_cache_that_others_may_use_is_left_alone(toy, root, tmp_path):
    kept = write(tmp_path / "cache/files/md5/ab/cdef0123456789abcdef0123456789", "x")
    config = write(root / ".dvc/config.local", f"[cache]\n    dir = {tmp_path / 'cache'}\n")
    done = toy.run(*COLLECT, "--cache")
    config.unlink()
    assert done.returncode == 1
    assert f"DVC's cache ({tmp_path / 'cache/files/md5'}) is not in {root}" in done.stderr
    assert kept.is_file()


def test_a_killed_stage_resumes_after_gc_and_old_runs_go_from_the_server(toy, server):
    with toy.flag("bad"):
        assert toy.stage("train").returncode == 1
    kept = toy.shards("train")
    assert toy.run(*COLLECT).returncode == 0
    done = toy.stage("train")
    assert done.stdout.count("was there already") == len(kept) > 0
    told = toy.run(*COLLECT, "--older-than", "1").stdout
    assert f"{RESULTS}  4 files, 0.0 MB  (results of shards whose files are gone)" in told
    assert "0 flow runs that ended more than 1 days ago deleted" in told
    told = toy.run(*COLLECT, "--older-than", "0", "--dry-run").stdout
    assert "2 flow runs that ended more than 0 days ago would be deleted" in told
    assert len(runs(server, "task")) > 0
    assert toy.run(*COLLECT, "--older-than", "0").returncode == 0
    wait_for(lambda: not runs(server, "flow") and not runs(server, "task"), 30, "no run")
