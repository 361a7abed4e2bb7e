"""Benchmarks by every door: names, entries, one stage, numbers kept by git; with a toy stage."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import dvcstage, lineage, overrides, store
from tasks.active import VALIDATION, load_active
from tasks.leftovers import leftovers
from tasks.params import run_names
from tasks.validation import activation
from tasks.validation.context import FIGURES, RESULT, SCORES, BenchmarkContext, result_file
from tasks.validation.settings import benchmark_file, is_benchmark, load_benchmark
from tasks.workspace import WORK, find_root, prepare, publish
from tests.checkout import (
    HOLD,
    Checkout,
    make_checkout,
    prefect_server,
    stage_process,
)
from tests.test_ui_doors import Station, git, worker

TARGET = f"{VALIDATION}:validate@quick"


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Path:
    """A folder with the params of the checkout, and data of which only the places are there."""
    shutil.copytree(root / "params", tmp_path / "params")
    for name, entry in load_active(root).benchmarks.items():
        (tmp_path / entry.data).mkdir(parents=True, exist_ok=True)
        assert load_benchmark(root, name)
    return tmp_path


def test_a_benchmark_and_a_run_cannot_have_one_name(project):
    assert is_benchmark(project, "quick")
    assert not is_benchmark(project, "smoke")
    assert not is_benchmark(project, "../benchmarks/quick")
    with pytest.raises(ValueError, match=r"'quick' is a benchmark .*; take another name"):
        overrides.new_run(project, "quick", "smoke", {})
    shutil.copy(project / "params/smoke.yaml", project / "params/quick.yaml")
    with pytest.raises(ValueError, match="cannot have the same name; rename one"):
        is_benchmark(project, "quick")


def test_activating_adds_an_entry_keeps_the_rest_and_is_idempotent(project):
    mine = project / benchmark_file("mine")
    shutil.copy(project / benchmark_file("quick"), mine)
    params = load_benchmark(project, "mine")
    with pytest.raises(ValueError, match=r"'mine' is not there.*flows activate mine"):
        activation.check_active_benchmark(project, "mine", params)
    before = (project / "params/active.yaml").read_text()
    assert activation.activate_benchmark(project, "mine")
    entry = f"  mine:\n    data: {activation.data_path(params.data)}\n"
    assert (project / "params/active.yaml").read_text() == before + entry
    activation.check_active_benchmark(project, "mine", params)
    assert not activation.activate_benchmark(project, "mine")
    assert activation.deactivate_benchmark(project, "mine")
    assert (project / "params/active.yaml").read_text() == before
    assert not activation.deactivate_benchmark(project, "mine")


def test_data_that_moved_or_are_not_there_are_told(project):
    mine = project / benchmark_file("mine")
    path = activation.data_path(load_benchmark(project, "quick").data)
    mine.write_text((project / benchmark_file("quick")).read_text())
    activation.activate_benchmark(project, "mine")
    mine.write_text(mine.read_text().replace(path, "data/elsewhere.csv"))
    params = load_benchmark(project, "mine")
    with pytest.raises(ValueError, match=r"`benchmarks.mine.data`: given .*flows activate mine"):
        activation.check_active_benchmark(project, "mine", params)
    with pytest.raises(ValueError, match=r"given 'data/elsewhere.csv', but .* does not exist"):
        activation.activate_benchmark(project, "mine")


def test_the_folder_of_the_other_dvc_yaml_is_no_root(root):
    assert find_root(root / VALIDATION.parent) == root


@pytest.fixture
def context(tmp_path: Path, root: Path) -> BenchmarkContext:
    params = load_benchmark(root, "quick")
    context = BenchmarkContext("quick", "validate", params, tmp_path, "f" * 64)
    prepare(context)
    return context


def test_the_numbers_are_published_by_a_new_file_at_a_place_of_their_own(context):
    old = context.root / result_file("quick")
    store.write_json(old, {"is": "old"})
    linked = context.root / "linked"
    linked.hardlink_to(old)
    store.write_json(context.out / RESULT, {"is": "new"})
    (context.out / SCORES).touch()
    publish(context)
    assert store.read_json(old) == {"is": "new"}
    assert store.read_json(linked) == {"is": "old"}
    assert [path.name for path in context.published.iterdir()] == [SCORES]


def test_a_benchmark_without_numbers_is_not_done(context):
    (context.out / SCORES).touch()
    with pytest.raises(ValueError, match=f"wrote no {RESULT}"):
        publish(context)
    assert not context.published.exists()


def test_each_active_benchmark_has_a_deployment_that_is_filled_in(root):
    from flows import deploy

    found = {door.name: door for door in deploy.doors_of(root)}
    for name in load_active(root).benchmarks:
        door = found.pop(f"validate-{name}")
        assert door.entrypoint == "flows.doors.benchmark"
        assert door.preset == {"run": name}
        assert load_benchmark(root, name).title in door.description
        assert "benchmark" in door.tags
        field = deploy.form_schema(door.flow, door.runs)["properties"]["run"]
        assert (field["title"], field["enum"]) == ("Benchmark", [name])
    assert set(found) == {"pipeline", "validate", "queries"}
    assert all(door.runs == run_names(root) for door in found.values())


@pytest.mark.parametrize(("given", "target"), [("", ""), ("BENCHMARK=energy", ":validate@energy")])
def test_make_validate_asks_dvc_for_one_or_all(root, given, target):
    command = ["make", "--dry-run", "validate", *given.split()]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    ends = f"dvc repro {VALIDATION}{target}"  # a make above this one tells its folders too
    assert any(line.endswith(ends) for line in told.splitlines())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, server: str) -> Checkout:
    """Committed, with `quick` up to date."""
    made = make_checkout(tmp_path_factory.mktemp("toy") / "project", server, toy=True)
    git(made, "add", ".")
    git(made, "commit", "-qm", "start")
    done = pipeline(made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(made.artifact("validate", "quick"))
    git(made, "add", ".")
    git(made, "commit", "-qm", "numbers")
    return made


def pipeline(checkout: Checkout, *arguments: str) -> subprocess.CompletedProcess[str]:
    return checkout.run("python", "-m", "flows.pipeline", "quick", *arguments)


def numbers(checkout: Checkout) -> Any:
    return store.read_json(checkout.path / result_file("quick"))


def test_a_benchmark_has_one_stage(checkout):
    for command in (
        ["flows.pipeline", "quick", "--until", "score"],
        ["flows.stage", "score", "quick"],
    ):
        done = checkout.run("python", "-m", *command)
        assert done.returncode == 1
        assert "quick is a benchmark and has one stage, validate" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert pipeline(checkout, "--until", "validate").returncode == 0


def test_what_is_up_to_date_is_cached_by_either_door(checkout):
    assert git(checkout, "status", "--short") == ""
    files = {path.name for path in checkout.artifact("validate", "quick").iterdir()}
    assert files == {SCORES, *FIGURES}
    assert "validate@quick: cached" in pipeline(checkout).stdout
    repro = checkout.run("dvc", "repro", TARGET)
    assert "didn't change, skipping" in repro.stdout, repro.stdout + repro.stderr
    assert "up to date" in checkout.run("dvc", "status", TARGET).stdout
    shown = checkout.run("dvc", "metrics", "show", "--json").stdout
    assert str(result_file("quick")) in shown
    told = checkout.run("python", "-m", "flows", "check", "quick").stdout
    assert "validate  is up to date" in told
    plain = checkout.run("dvc", "repro", "--dry").stdout
    assert "quick" not in plain  # the runs' stages are another file's


def test_only_what_changes_the_result_runs_it_again_and_the_old_one_comes_back(checkout):
    before = numbers(checkout)
    checkout.edit(str(benchmark_file("quick")), "tokens_per_batch: 4096", "tokens_per_batch: 64")
    assert "validate@quick: cached" in pipeline(checkout).stdout
    checkout.edit(str(benchmark_file("quick")), "training: true", "ratio: 0.2")
    done = pipeline(checkout)
    assert "validate@quick: runs (changed deps: params/benchmarks/quick.yaml" in done.stdout
    assert numbers(checkout) != before
    diff = json.loads(checkout.run("dvc", "params", "diff", "--json").stdout)
    changed = diff[str(benchmark_file("quick"))]
    assert changed["damping.training"]["old"] is True
    assert changed["damping.ratio"]["new"] == 0.2
    git(checkout, "checkout", str(benchmark_file("quick")))
    assert "is cached - skipping run" in pipeline(checkout).stdout
    assert numbers(checkout) == before
    assert git(checkout, "status", "--short") == ""


def test_kill_9_leaves_nothing_half_done_and_the_rerun_resumes(checkout):
    before = numbers(checkout)
    code = checkout.path / "tasks/benchmark.py"
    code.write_text(code.read_text() + "# says nothing new\n")
    with checkout.flag(HOLD), checkout.started("dvc", "repro", TARGET) as process:
        checkout.wait_held("validate", "quick")
        stage = stage_process(process.pid)
        assert stage is not None
        stage.kill()
        process.communicate(timeout=30)
    assert not checkout.artifact("validate", "quick").joinpath(SCORES).exists()
    abandoned = [each.path.parent.name for each in leftovers(checkout.path)]
    assert WORK.name not in abandoned  # the stage would resume there
    done = pipeline(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("was there already") == 2
    assert numbers(checkout) == before
    git(checkout, "checkout", ".")
    assert "validate@quick: cached" in pipeline(checkout).stdout


def test_gc_keeps_what_the_lock_file_names(checkout):
    done = checkout.run("python", "-m", "flows", "gc", "--cache")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(checkout.artifact("validate", "quick"))
    done = checkout.run("dvc", "checkout", str(VALIDATION))
    assert (checkout.artifact("validate", "quick") / SCORES).is_file(), done.stdout + done.stderr
    assert "validate@quick: cached" in pipeline(checkout).stdout


def test_the_tags_say_where_the_numbers_come_from(checkout):
    params = load_benchmark(checkout.path, "quick")
    fingerprint = dvcstage.input_fingerprint(checkout.path, "validate", "quick", params.runtime)
    context = BenchmarkContext("quick", "validate", params, checkout.path, fingerprint)
    tags = lineage.benchmark_tags(context, benchmark_file("quick"))
    assert (tags["run"], tags["stage"], tags["git.dirty"]) == ("quick", "validate", "false")
    assert len(tags[f"dvc.in.{activation.data_path(params.data)}"]) == 32


@pytest.mark.doors
def test_a_benchmark_is_started_from_the_ui(checkout, server):
    urls = {"INFLUENCE_PREFECT_URL": server.removesuffix("/api")}
    station = Station(Checkout(checkout.path, server, urls), server)
    with worker(station.checkout):
        deployments = station.call("/deployments/filter", {})
        found = {each["name"]: each for each in deployments}
        deployment = found["validate-quick"]
        assert deployment["parameters"] == {"run": "quick"}
        assert deployment["global_concurrency_limit"]["limit"] == 1
        body = {"state": {"type": "SCHEDULED"}}
        run = station.call(f"/deployments/{deployment['id']}/create_flow_run", body)["id"]
        assert station.ended(run)["type"] == "COMPLETED"
        assert station.stages(run) == {"validate": "Cached"}
        (task,) = station.tasks(run)
        assert task["name"] == "validate@quick"
        shown = station.call("/artifacts/filter", {})
        assert {"quick-outputs", "quick-correlation"} <= {each["key"] for each in shown}
        name = station.call(f"/flow_runs/{run}")["name"]
        assert name == "quick"
    assert git(checkout, "status", "--short") == ""
    assert checkout.run("python", "-m", "flows", "deactivate", "quick").returncode == 0
    done = checkout.run("python", "-m", "flows", "deploy")
    assert done.returncode == 0, done.stderr
    names = {each["name"] for each in station.call("/deployments/filter", {})}
    assert "validate-quick" not in names
    assert "validate-concrete" in names
