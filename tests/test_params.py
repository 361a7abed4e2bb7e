"""A params file is checked at the door: file, key, given, wanted, what to do."""

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import checks
from tasks import active
from tasks.origin import Architecture, Checkpoint, HubCheckpoint, Scratch
from tasks.params import NoFilter, Value, load_params, params_file

RUNS = ("tinystories", "smoke")


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Path:
    """A folder with the params of the checkout and the inputs that they name, empty."""
    shutil.copytree(root / "params", tmp_path / "params")
    for name in ("models/stories260K", "tinystories", "queries"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in (
        "tinystories/first1000.jsonl.gz",
        "queries/smoke.jsonl",
        "queries/tinystories.jsonl",
    ):
        (tmp_path / "data" / name).touch()
    return tmp_path


def edit(project: Path, run: str, change: Callable[[dict[str, Any]], Any]) -> None:
    file = project / params_file(run)
    content = YAML(typ="safe").load(file)
    change(content)
    with file.open("w") as stream:
        YAML(typ="safe").dump(content, stream)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the value at a dotted path."""

    def change(content: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize("run", RUNS)
def test_a_shipped_run_is_valid_and_active_and_names_inputs_that_exist(root, run):
    params = load_params(root, run)
    active.check_active(root, run, params)
    active.check_inputs(root, run, params)


def test_params_are_values(root):
    params = load_params(root, "smoke")
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(load_params(root, "smoke"))
    with pytest.raises(ValueError, match="frozen"):
        params.query.rank = 3  # pyright: ignore


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("query.rank", 0, "`query.rank`: given 0, wanted greater than or equal to 1 .*null: full"),
        ("query.rank", "32", "`query.rank`: given '32', wanted a whole number"),
        ("query.rank", 32.0, "`query.rank`: given 32.0, wanted a whole number"),
        ("query.rnk", 3, "`query.rnk` is unknown; did you mean `rank`\\?"),
        ("qeury", {}, "`qeury` is unknown; did you mean `query`\\?"),
        ("query.damping", {"rato": 0.1}, "`query.damping`: given .* wanted one of ratio or value"),
        ("query.damping", {"ratio": 0.1, "value": 1}, "`query.damping.value` is unknown"),
        ("query.damping", {"ratio": 0}, "`query.damping.ratio`: given 0, wanted greater than 0"),
        ("query.damping", {"value": float("inf")}, "`query.damping.value`: given inf"),
        ("query.damping", 0.1, "`query.damping`: given 0.1"),
        ("filter.method", "bm25", "`filter`: .*wanted one of method: tfidf or method: none"),
        ("filter", {"method": "none", "top": 3}, "`filter.top` is unknown; remove it"),
        (
            "train",
            {"checkpoints": {}},
            "`train`: .*wanted one of checkpoint or finetune or scratch",
        ),
        ("train.checkpoint", {"hub": "a/b", "revision": "main"}, "full sha of a commit"),
        (
            "train.checkpoint",
            {"hub": "name", "revision": "0" * 40},
            "hub`: given",
        ),
        ("train", {"scratch": {"architecture": "bert"}}, "wanted 'gpt2' or 'llama'"),
        ("layers", [], "`layers`: given \\[\\], wanted a list that has at least 1 item"),
        ("layers", "mlp", "`layers`: given 'mlp', wanted a list"),
        ("layers", [3], "`layers.0`: given 3, wanted text"),
        ("corpus.limit", 0, "`corpus.limit`: given 0"),
        ("corpus.text", "", "`corpus.text`: given ''"),
        ("tokenize.bos", 1, "`tokenize.bos`: given 1, wanted true or false"),
        ("tokenize.mode", "packed", "`tokenize.mode`: given 'packed', wanted 'document' or 'pack'"),
        ("tokenize.context", 1, "`tokenize.context`: given 1"),
        ("factors.seed", -1, "`factors.seed`: given -1"),
        ("report.top", 999, "report.top 999 is more than score.top [0-9]+; lower the one"),
        ("runtime.shards", 51, "`runtime.shards`: given 51, wanted less than or equal to 50"),
        ("runtime.device", "tpu", "given 'tpu', wanted 'auto', 'cpu', 'cuda' or 'spread'"),
        ("query", 3, "`query`: given 3"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(project, path, value, complaint):
    edit(project, "tinystories", put(path, value))
    with pytest.raises(ValueError, match=complaint) as raised:
        load_params(project, "tinystories")
    assert all(
        each.startswith("params/tinystories.yaml: ") for each in str(raised.value).split("\n")
    )


def leaves(content: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted path of a nested dict."""
    paths = []
    for key, value in content.items():
        paths.append(f"{prefix}{key}")
        if isinstance(value, dict):
            paths += leaves(value, f"{prefix}{key}.")
    return paths


@pytest.mark.parametrize("run", RUNS)
def test_every_key_is_required(project, run):
    content = YAML(typ="safe").load(project / params_file(run))
    for path in leaves(content):
        *outer, last = path.split(".")
        without = copy.deepcopy(content)
        inside = without
        for key in outer:
            inside = inside[key]
        del inside[last]
        edit(project, run, lambda given, new=without: (given.clear(), given.update(new)))
        with pytest.raises(ValueError, match=r"is missing|wanted one of"):
            load_params(project, run)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  rank: 32", "  rank: 32\n  rank: 8", ":[0-9]+ is not YAML: found duplicate key"),
        ("corpus:\n", "corpus: [\n", ":[0-9]+ is not YAML"),
    ],
)
def test_broken_yaml_is_named_with_its_line(project, old, new, complaint):
    file = project / params_file("tinystories")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        load_params(project, "tinystories")


def test_an_empty_file_is_refused(project):
    (project / params_file("smoke")).write_text("")
    with pytest.raises(ValueError, match="given NoneType, wanted keys"):
        load_params(project, "smoke")


def test_an_unknown_run_is_answered_with_the_known_ones(root):
    with pytest.raises(ValueError, match=r"no params/nope.yaml .* smoke or tinystories"):
        load_params(root, "nope")


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a.b", "-a"])
def test_a_run_name_that_dvc_could_not_take_is_refused(root, name):
    with pytest.raises(ValueError, match="run name"):
        load_params(root, name)


def test_each_kind_of_a_union_is_read_by_its_key(project):
    scratch = load_params(project, "smoke").train
    assert isinstance(scratch, Scratch)
    assert isinstance(scratch.scratch, Architecture)
    hub = {"checkpoint": {"hub": "o/n", "revision": "a" * 40}}
    for path, value in (
        ("train", hub),
        ("query.damping", {"value": 1e-3}),
        ("filter", {"method": "none"}),
        ("query.rank", None),
    ):
        edit(project, "tinystories", put(path, value))
    params = load_params(project, "tinystories")
    assert isinstance(params.train, Checkpoint)
    assert isinstance(params.train.checkpoint, HubCheckpoint)
    assert params.query.damping == Value(value=1e-3)
    assert isinstance(params.filter, NoFilter)
    assert params.query.rank is None
    assert active.fit_entry(params).model == "data/tinystories"


def test_a_width_that_does_not_split_into_heads_is_refused(project):
    edit(project, "smoke", put("train.scratch.width", 31))
    with pytest.raises(ValueError, match=r"`train.*`: width 31 does not split into 2 heads"):
        load_params(project, "smoke")


def test_sequences_longer_than_the_model_to_train_are_refused(project):
    edit(project, "smoke", put("tokenize.context", 65))
    with pytest.raises(ValueError, match=r"tokenize.context 65 is longer .* 64"):
        load_params(project, "smoke")


def test_activate_adds_a_run_keeps_comments_and_is_idempotent(project):
    shutil.copy(project / params_file("tinystories"), project / params_file("mine"))
    with pytest.raises(ValueError, match=r"'mine' is not there.*flows activate mine"):
        active.check_active(project, "mine", load_params(project, "mine"))
    before = (project / "params/active.yaml").read_text()
    assert active.activate(project, "mine")
    entry = "  mine:\n    queries: data/queries/tinystories.jsonl\n    fit: tinystories\n"
    after = (project / "params/active.yaml").read_text()
    assert after == before.replace("benchmarks:\n", f"{entry}benchmarks:\n")  # comments stay
    assert not active.activate(project, "mine")
    assert active.check_active(project, "mine", load_params(project, "mine")) == "tinystories"


def test_runs_that_agree_on_the_fit_share_it_and_others_do_not(project):
    for name, path, value in (
        ("other", "query.damping", {"ratio": 0.3}),
        ("wider", "layers", ["all"]),
    ):
        shutil.copy(project / params_file("tinystories"), project / params_file(name))
        edit(project, name, put(path, value))
        active.activate(project, name)
    told = active.load_active(project)
    assert {name: entry.fit for name, entry in told.runs.items()} == {
        "tinystories": "tinystories", "smoke": "smoke", "other": "tinystories", "wider": "wider",
    }  # fmt: skip
    assert active.owner(project, "factors", "other") == "tinystories"
    assert active.owner(project, "stream", "other") == "other"
    with pytest.raises(ValueError, match="other uses the fit of 'tinystories'"):
        active.deactivate(project, "tinystories")

    edit(project, "tinystories", put("factors.sequences", 64))
    other = load_params(project, "other")
    with pytest.raises(ValueError, match=r"runs.other.fit.*differ in factors.*activate other"):
        active.check_active(project, "other", other)
    active.activate(project, "tinystories")
    assert active.activate(project, "other")
    assert active.check_active(project, "other", other) == "other"

    assert active.deactivate(project, "other")
    assert not active.deactivate(project, "other")
    told = active.load_active(project)
    assert set(told.fits) == {"tinystories", "smoke", "wider"}
    assert set(told.runs) == {"tinystories", "smoke", "wider"}


def test_active_that_disagrees_with_the_params_file_is_refused(project):
    edit(project, "smoke", put("query.path", "data/queries/tinystories.jsonl"))
    with pytest.raises(ValueError, match=r"`runs.smoke.queries`: given .*flows activate smoke"):
        active.check_active(project, "smoke", load_params(project, "smoke"))
    assert active.activate(project, "smoke")
    active.check_active(project, "smoke", load_params(project, "smoke"))


@pytest.mark.parametrize("key", ["corpus.path", "query.path", "train.checkpoint.path"])
def test_an_input_that_does_not_exist_is_named_with_its_key(project, key):
    edit(project, "tinystories", put(key, "data/nowhere"))
    params = load_params(project, "tinystories")
    with pytest.raises(ValueError, match=f"`{key}`: given 'data/nowhere', but .* does not exist"):
        active.check_inputs(project, "tinystories", params)


@pytest.mark.parametrize(
    ("corpus", "query", "complaint"),
    [
        ('{"body": "A cat."}', '{"name": "q", "prompt": "A", "completion": " cat"}',
         r"mine.jsonl:1: no field 'text', which corpus.text names; fields there: 'body'"),
        ('{"id": "a", "text": "A cat."}', '{"name": "q", "prompt": "A", "completion": ""}',
         r"asked.jsonl:1: the query's completion is empty"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_read_are_told_before_a_stage_begins(
    project, corpus, query, complaint
):
    (project / "mine.jsonl").write_text(corpus + "\n")
    (project / "asked.jsonl").write_text(query + "\n")
    edit(project, "tinystories", put("corpus.path", "mine.jsonl"))
    edit(project, "tinystories", put("query.path", "asked.jsonl"))
    active.activate(project, "tinystories")
    with pytest.raises(ValueError, match=complaint):
        checks.check(project, "tinystories")
