"""The run forms: what they offer, what they write into the params, what they refuse."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from flows.forms import KEYS, Changes, Measurements, Stage, TypedQuery
from tasks import overrides
from tasks.params import load_params, params_file
from tasks.querylines import check_queries
from tasks.workspace import STAGES


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Path:
    shutil.copytree(root / "params", tmp_path / "params")
    return tmp_path


@pytest.fixture(scope="module")
def schema(root: Path) -> dict[str, Any]:
    from flows import deploy

    return deploy.form_schema(deploy.doors.pipeline, ["smoke", "tinystories"])


def changed_lines(project: Path, root: Path, run: str) -> list[tuple[str, str]]:
    """Lines of a params file that differ from the checkout's: (before, now)."""
    before = (root / params_file(run)).read_text().splitlines()
    now = (project / params_file(run)).read_text().splitlines()
    assert len(before) == len(now)
    return [(a.strip(), b.strip()) for a, b in zip(before, now, strict=True) if a != b]


def test_the_stages_of_the_form_are_those_of_the_pipeline():
    assert get_args(Stage) == STAGES


def test_every_field_of_a_form_is_a_key_of_the_params_file(root):
    params = load_params(root, "tinystories").model_dump(by_alias=True)
    for key in KEYS.values():
        *outer, last = key.split(".")
        section = params
        for name in outer:
            section = section[name]
        assert last in section
    fields = {*Changes.model_fields, *Measurements.model_fields}
    assert set(KEYS) <= fields
    others = fields - set(KEYS)
    assert others == {"damping_ratio", "damping_value", "full_rank", "score_all"}


def test_an_empty_form_changes_nothing(project, root):
    assert Changes().settings() == {}
    before = (project / "params/tinystories.yaml").read_bytes()
    assert overrides.change_params(project, "tinystories", Changes().settings()) == []
    assert (project / "params/tinystories.yaml").read_bytes() == before


def test_what_is_filled_in_is_written_with_the_comments_kept(project, root):
    changes = Changes(damping_ratio=0.02, rank=16, candidates=40, top=12)
    told = overrides.change_params(project, "tinystories", changes.settings())
    assert told == [
        "query.rank: 32 → 16",
        "filter.top: 80 → 40",
        "score.top: 10 → 12",
        "query.damping: ratio 0.1 → ratio 0.02",
    ]
    for before, now in changed_lines(project, root, "tinystories"):
        assert before.partition("#")[2] == now.partition("#")[2]
    params = load_params(project, "tinystories")
    assert (params.query.rank, params.query.damping.model_dump()) == (16, {"ratio": 0.02})
    assert overrides.change_params(project, "tinystories", changes.settings()) == []


def test_another_kind_of_value_takes_the_place_of_the_old(project):
    changes = Changes(damping_value=1e-5, full_rank=True, score_all=True, layers=["attention"])
    overrides.change_params(project, "tinystories", changes.settings())
    text = (project / "params/tinystories.yaml").read_text()
    assert "rank: null" in text
    params = load_params(project, "tinystories")
    assert params.query.damping.model_dump() == {"value": 1e-5}
    assert params.query.rank is None
    assert params.filter.model_dump() == {"method": "none"}
    assert params.layers == ("attention",)
    with pytest.raises(ValueError, match=r"`filter.top` does not go with .*method none"):
        overrides.change_params(project, "tinystories", Changes(candidates=3).settings())


def test_a_change_that_would_not_be_valid_leaves_the_file_as_it_was(project):
    before = (project / "params/tinystories.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"report.top 10 is more than score.top 2"):
        overrides.change_params(project, "tinystories", Changes(top=2).settings())
    assert (project / "params/tinystories.yaml").read_bytes() == before


def test_a_new_run_is_made_from_another_and_never_over_one(project):
    told = overrides.new_run(project, "mine", "tinystories", Changes(rank=8).settings())
    assert told == ["query.rank: 32 → 8"]
    text = (project / "params/mine.yaml").read_text()
    assert text.startswith("# Run `mine`, made from params/tinystories.yaml.\n")
    assert "# of each sign" in text
    assert load_params(project, "mine").query.rank == 8
    assert load_params(project, "tinystories").query.rank == 32
    for name in ("mine", "smoke"):
        with pytest.raises(ValueError, match=rf"params/{name}.yaml exists already"):
            overrides.new_run(project, name, "tinystories", {})
    for name in ("../mine", "active", "Mine", ""):
        with pytest.raises(ValueError, match="wanted lower-case letters"):
            overrides.new_run(project, name, "tinystories", {})


@pytest.mark.parametrize(
    "given",
    [
        {"damping_ratio": 0.1, "damping_value": 1.0},
        {"rank": 3, "full_rank": True},
        {"candidates": 3, "score_all": True},
        {"damping_ratio": 0},
        {"damping_value": float("inf")},
        {"rank": 0},
        {"layers": []},
        {"queries": ""},
        {"dampening": 1},
    ],
)
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(ValidationError):
        Changes(**given)


def test_a_typed_query_wants_a_name_a_prompt_and_a_completion():
    TypedQuery(name="a", prompt="b", completion=" c")
    TypedQuery(name="a", prompt="b", completion=" c", contrast=" d")
    TypedQuery(name="a", prompt="b", generate=8)
    wrong = ({"name": "A b"}, {"prompt": ""}, {"completion": ""}, {"contrast": ""})
    for given in (
        *wrong,
        {"completion": None},
        {"generate": 8},
        {"completion": None, "generate": 0},
    ):
        with pytest.raises(ValidationError):
            TypedQuery.model_validate({"name": "a", "prompt": "b", "completion": "c"} | given)


def test_the_form_has_titles_help_bounds_and_the_runs(schema):
    fields = schema["properties"]
    assert fields["run"]["enum"] == ["smoke", "tinystories"]
    assert fields["until"]["enum"] == list(STAGES)
    assert fields["new_run"]["title"] == "Name of a new run"
    changes = schema["definitions"]["Changes"]["properties"]
    assert changes["damping_ratio"]["title"] == "Damping: ratio"
    assert changes["damping_ratio"]["exclusiveMinimum"] == 0
    assert "description" in changes["rank"]


@pytest.mark.parametrize("door", ["pipeline", "validate", "queries", "benchmark"])
def test_no_help_has_an_angle_bracket_which_the_page_would_take_for_a_tag(door):
    from flows import deploy

    made = deploy.form_schema(getattr(deploy.doors, door), ["smoke"])
    told = [
        field["description"]
        for fields in (made, *made.get("definitions", {}).values())
        for field in fields["properties"].values()
        if "description" in field
    ]
    assert told
    assert not [text for text in told if "<" in text]


def test_an_empty_field_is_empty_and_not_a_choice_of_types(schema):
    for fields in (schema, *schema["definitions"].values()):
        for field in fields["properties"].values():
            assert "anyOf" not in field
            assert field.get("default", 0) is not None
    assert "default" not in schema["properties"]["changes"]


def test_a_query_set_is_given_by_path_or_by_its_name(tmp_path):
    from flows import doors

    (tmp_path / "data/queries").mkdir(parents=True)
    line = '{"name": "a", "prompt": "b", "completion": " c"}\n'
    for path in ("data/queries/facts.jsonl", "mine.jsonl"):
        (tmp_path / path).write_text(line)
    found = [doors._query_set(tmp_path, "x", given, None) for given in ("facts", "mine.jsonl")]
    assert found == ["data/queries/facts.jsonl", "mine.jsonl"]
    with pytest.raises(ValueError, match=r"no query set 'ghost' in data/queries: there are facts;"):
        doors._query_set(tmp_path, "x", "ghost", None)


def test_typed_queries_are_written_as_lines_that_are_read(tmp_path):
    from flows import doors

    typed = [
        TypedQuery(name="a", prompt="b", completion=" c"),
        TypedQuery(name="d", prompt="e", generate=8),
    ]
    path = doors._query_set(tmp_path, "mine", None, typed)
    assert path == "data/queries/mine.jsonl"
    assert [record.fields.get("generate") for record in check_queries(tmp_path / path)] == [None, 8]
