"""`dvc.yaml` says what the code does: deps, params, artefacts, one stage a word, every run."""

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import closure
from tasks import dvcstage
from tasks.active import FIT_SECTIONS, VALIDATION, activate, load_active
from tasks.params import load_params, run_names
from tasks.validation.activation import check_active_benchmark, check_data
from tasks.validation.context import FIGURES, SCORES
from tasks.validation.settings import BenchmarkParams, benchmark_names, load_benchmark
from tasks.workspace import FIT_STAGES, STAGES
from tests.checkout import Checkout, make_checkout

RUNS = ("tinystories", "smoke")


@pytest.fixture(scope="module")
def stages(root: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(root / "dvc.yaml")["stages"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("toy") / "project", toy=True)


def test_deps_and_params_are_what_the_code_needs(root):
    stale = closure.stale_deps(root)
    assert not stale, "run `python -m flows deps --write`"


def test_one_word_a_stage_in_all_places(root, stages):
    assert tuple(stages) == STAGES
    for stage, entry in stages.items():
        assert entry["foreach"] == ("${fits}" if stage in FIT_STAGES else "${runs}")
        body = entry["do"]
        assert body["cmd"] == f"exec python -m flows.stage {stage} ${{key}}"
        assert (root / "tasks" / f"{stage}.py").is_file()
        outs = [*body.get("outs", []), *body.get("metrics", []), *body.get("plots", [])]
        assert outs
        assert all(out.startswith(f"artifacts/${{key}}/{stage}") for out in outs)


def test_runtime_is_never_tracked(stages):
    keys = [key for entry in stages.values() for key in closure._tracked(entry["do"])]
    assert not [key for key in keys if key.startswith("runtime")]


def test_a_stage_reads_only_artefacts_of_stages_before_it(stages):
    for stage, entry in stages.items():
        folders = {dep for dep in entry["do"]["deps"] if dep.startswith("artifacts/")}
        assert folders <= {artifact(name, stage) for name in STAGES[: STAGES.index(stage)]}


def test_the_artefacts_that_a_stages_own_file_reads_are_its_deps(root, stages):
    for stage, entry in stages.items():
        tree = ast.parse((root / "tasks" / f"{stage}.py").read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        read = {
            argument.value
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "artifact"
            for argument in call.args
            if isinstance(argument, ast.Constant)
        }
        assert {artifact(name, stage) for name in read} <= set(entry["do"]["deps"])


def artifact(stage: str, reader: str) -> str:
    """The artefact of a stage as the deps of another have it."""
    shared = stage in FIT_STAGES and reader not in FIT_STAGES
    return f"artifacts/{'${item.fit}' if shared else '${key}'}/{stage}"


def test_what_a_fit_reads_is_what_runs_must_agree_on_to_share_it(root):
    read = {
        key.split(".")[0] for stage in FIT_STAGES for key in closure.params_of_stage(root, stage)
    }
    assert read == set(FIT_SECTIONS)
    for stage in FIT_STAGES:
        assert set(dvcstage.upstream(root, stage, "smoke")) <= set(FIT_STAGES)


def test_a_run_that_trains_on_the_model_of_another_waits_for_its_own_stages_alone(tmp_path):
    root = make_checkout(tmp_path / "project").path
    (root / "artifacts/wikipedia/train/checkpoint").mkdir(parents=True)
    for run in ("wikipedia", "chat"):
        activate(root, run)
    deps, _ = dvcstage.tracked_paths(root, "train", "chat")
    assert "artifacts/wikipedia/train/checkpoint" in deps
    assert dvcstage.upstream(root, "train", "chat") == []
    assert dvcstage.upstream(root, "tokenize", "chat") == ["train"]
    assert set(dvcstage.upstream(root, "report", "chat")) >= {"query", "score", "validate"}


@pytest.mark.parametrize(
    ("changed", "stay"),
    [
        ("influence/scores.py", {"train", "tokenize", "filter", "factors", "eigen", "correct"}),
        ("tasks/report.py", set(STAGES) - {"report"}),
        ("tasks/tracking.py", set(STAGES) - {"validate", "report"}),
        ("flows/pipeline.py", set(STAGES)),
        ("flows/stage.py", set(STAGES)),
    ],
)
def test_a_change_of_code_leaves_the_stages_that_do_not_import_it(root, changed, stay):
    assert (root / changed).is_file()
    reruns = {stage for stage in STAGES if changed in closure.code_of_stage(root, stage)}
    assert not reruns & stay


def test_a_change_of_damping_refits_nothing(root):
    for stage in ("train", "tokenize", "filter", "factors", "eigen", "correct"):
        tracked = closure.params_of_stage(root, stage)
        assert not {key for key in tracked if key in ("query", "query.damping")}


@pytest.mark.parametrize("run", RUNS)
def test_every_run_that_is_active_has_all_stages_with_its_inputs(root, run):
    active = load_active(root)
    fit, queries = active.fits[run], active.runs[run].queries
    inputs = {"train": fit.model, "tokenize": fit.corpus, "query": queries}
    for stage in STAGES:
        deps, outs = dvcstage.tracked_paths(root, stage, run)
        assert all(out.startswith(f"artifacts/{run}/{stage}") for out in outs)
        assert inputs.get(stage, deps[0]) in deps


@pytest.fixture(scope="module")
def benchmark(root: Path) -> dict[str, Any]:
    """The one stage of `validation/dvc.yaml`."""
    (stage,) = YAML(typ="safe").load(root / VALIDATION)["stages"].items()
    assert stage[0] == "validate"
    assert stage[1]["foreach"] == "${benchmarks}"
    return stage[1]["do"]


def test_the_stage_of_benchmarks_runs_at_the_root_and_keeps_its_numbers_in_git(benchmark):
    assert benchmark["wdir"] == ".."
    assert benchmark["cmd"] == "exec python -m flows.stage validate ${key}"
    assert benchmark["metrics"] == [{"docs/results/${key}.json": {"cache": False}}]
    assert benchmark["outs"] == [f"artifacts/${{key}}/validate/{SCORES}"]
    assert benchmark["plots"] == [f"artifacts/${{key}}/validate/{name}" for name in FIGURES]


def test_a_benchmark_tracks_all_of_its_params_but_runtime(benchmark):
    (tracked,) = benchmark["params"]
    keys = tracked["params/benchmarks/${key}.yaml"]
    assert set(keys) == set(BenchmarkParams.model_fields) - {"runtime"}


def test_the_code_of_a_benchmark_is_its_deps(root, benchmark):
    code = closure.code_of_stage(root, "benchmark")
    assert {"tasks/benchmark.py", "tasks/validation/settings.py"} <= set(code)
    assert benchmark["deps"] == [*code, "${item.data}"]


def test_every_benchmark_loads_and_the_active_ones_have_their_data(root):
    active = set(load_active(root).benchmarks)
    assert active <= set(benchmark_names(root))
    for name in benchmark_names(root):
        params = load_benchmark(root, name)
        if name in active:
            check_active_benchmark(root, name, params)
            check_data(root, name, params)
            deps, outs = dvcstage.tracked_paths(root, "validate", name)
            assert load_active(root).benchmarks[name].data in deps
            assert f"docs/results/{name}.json" in outs
            assert f"params/benchmarks/{name}.yaml:seeds" in deps


def test_no_run_has_the_name_of_a_benchmark(root):
    assert not set(run_names(root)) & set(benchmark_names(root))


def test_a_stage_that_dvc_does_not_have_is_told_how_to_get(root):
    runtime = load_params(root, "smoke").runtime
    with pytest.raises(ValueError, match=r"no stage train@gone.*flows activate gone"):
        dvcstage.input_fingerprint(root, "train", "gone", runtime)


def test_the_fingerprint_changes_with_what_the_partial_results_depend_on(toy):
    runtime = load_params(toy.path, "smoke").runtime

    def fingerprint(**changes: Any) -> str:
        changed = runtime.model_copy(update=changes)
        return dvcstage.input_fingerprint(toy.path, "train", "smoke", changed)

    first = fingerprint()
    assert fingerprint(workers=7) == fingerprint() == first
    assert fingerprint(shards=9) != first
    assert fingerprint(dtype="float64") != first
    code, params = toy.path / "tasks/train.py", toy.path / "params/smoke.yaml"
    for file, old, new in (
        (code, '"""Toy stage."""', '"""Another toy."""'),
        (toy.path / "tasks/store.py", "CHUNK = 1 << 20", "CHUNK = 1 << 21"),
    ):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        assert fingerprint() != first
        file.write_text(text)
        assert fingerprint() == first
    params.write_text(params.read_text().replace("rank: 8", "rank: 9"))
    assert fingerprint() == first  # `train` does not track query.rank


def test_the_closure_follows_imports_everywhere_and_takes_templates(tmp_path):
    files = {
        "tasks/__init__.py": "",
        "tasks/train.py": "import tasks.one\nfrom tasks import two\nimport torch\n",
        "tasks/one.py": "def f():\n    from tasks.page.three import g\n",
        "tasks/two.py": "from influence.deep import x\n",
        "tasks/page/__init__.py": "",
        "tasks/page/three.py": "",
        "tasks/page/look.css": "",
        "tasks/page/parts/head.html.j2": "",
        "tasks/page/notes.md": "",
        "tasks/unused.py": "",
        "influence/__init__.py": "",
        "influence/deep.py": "import tasks.one\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    wanted = set(files) - {"tasks/unused.py", "tasks/page/notes.md"}
    assert set(closure.code_of_stage(tmp_path, "train")) == wanted


def test_the_params_that_code_reads_are_found(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/train.py").write_text(
        "def run(context, params):\n"
        "    a = context.params.query.damping.ratio\n"
        "    b = params.query.path\n"
        "    c = context.params.factors\n"
        "    d = context.params.factors.seed\n"
        "    e = context.params.validate_.seed\n"
        "    f = context.params.runtime.shards\n"
        "    g = context.params.filter.model_dump()\n"
        "    h = other.score.top\n"
    )
    assert closure.params_of_stage(tmp_path, "train") == {
        "query.damping", "query.path", "factors", "validate.seed", "filter",
    }  # fmt: skip


def test_writing_the_deps_repairs_them_and_keeps_the_rest(toy):
    before = (toy.path / "dvc.yaml").read_text()
    shutil.copy(toy.path / "dvc.yaml", toy.path / "keep")
    toy.edit("dvc.yaml", "        - tasks/shards.py\n", "        - tasks/report.py\n")
    stale = closure.stale_deps(toy.path)
    assert stale == {"train": "lacks tasks/shards.py, has tasks/report.py too much"}
    assert toy.run("python", "-m", "flows", "deps").returncode == 1
    assert toy.run("python", "-m", "flows", "deps", "--write").returncode == 0
    assert (toy.path / "dvc.yaml").read_text() == before
    before = (toy.path / VALIDATION).read_text()
    toy.edit(str(VALIDATION), "        - tasks/shards.py\n", "        - tasks/report.py\n")
    stale = closure.stale_deps(toy.path)
    told = "lacks tasks/shards.py, has tasks/report.py too much"
    assert stale == {"validation/dvc.yaml:validate": told}
    closure.write_deps(toy.path)
    assert (toy.path / VALIDATION).read_text() == before


def test_dvc_itself_reads_the_pipeline(toy):
    for command in (["dag"], ["status", "train@smoke"], ["params", "diff"], ["metrics", "show"]):
        done = toy.run("dvc", *command)
        assert done.returncode == 0, done.stderr
    done = toy.run("dvc", "stage", "list", "--name-only")
    names = done.stdout.split()
    assert sorted(names) == sorted(f"{stage}@{run}" for stage in STAGES for run in RUNS)
    done = toy.run("dvc", "stage", "list", "--name-only", str(VALIDATION))
    names = {f"{VALIDATION}:validate@{name}" for name in load_active(toy.path).benchmarks}
    assert set(done.stdout.split()) == names
