"""Where things lie: roots, artefacts that a stage may read, publishing; lines for a terminal."""

import dataclasses
from pathlib import Path

import pytest

from tasks import store
from tasks.params import load_params
from tasks.store import StorageError
from tasks.terminal import flat, said, snippet, top_lines, top_rows
from tasks.workspace import StageContext, find_root, outer_root, prepare, publish


@pytest.fixture
def context(tmp_path: Path, root: Path) -> StageContext:
    return StageContext("smoke", "factors", load_params(root, "smoke"), tmp_path, "f" * 64)


def test_the_root_is_the_nearest_folder_with_a_dvc_yaml(tmp_path):
    inner = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    (inner / "deep").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no dvc\.yaml in"):
        find_root(inner)
    (tmp_path / "dvc.yaml").touch()
    assert find_root(inner / "deep") == tmp_path
    (inner / "dvc.yaml").touch()
    assert find_root(inner / "deep") == inner


def test_a_temporary_checkout_of_an_experiment_knows_the_users_own(tmp_path):
    assert outer_root(tmp_path) == tmp_path
    assert outer_root(tmp_path / ".dvc/tmp/exps/standalone/tmp1") == tmp_path
    assert outer_root(tmp_path / ".dvc/tmp/exps/tmp1") == tmp_path


def test_an_artefact_that_is_not_there_says_how_to_make_it(context):
    with pytest.raises(ValueError, match=r"stage train .* has not run; .* smoke --until factors"):
        context.artifact("train")


def test_an_artefact_that_dvc_does_not_know_of_cannot_be_read(context):
    declared = dataclasses.replace(context, reads=("train",))
    (context.root / "artifacts/smoke/train").mkdir(parents=True)
    assert declared.artifact("train").is_dir()
    with pytest.raises(ValueError, match=r"add artifacts/\$\{key\}/eigen there"):
        declared.artifact("eigen")


def test_out_is_published_whole_in_place_of_the_old_one(context):
    prepare(context)
    (context.out / "new").touch()
    context.published.mkdir(parents=True)
    (context.published / "old").touch()
    publish(context)
    assert [path.name for path in context.published.iterdir()] == ["new"]
    assert not context.work.exists()


def test_a_stage_that_wrote_nothing_is_not_done(context):
    prepare(context)
    with pytest.raises(ValueError, match="stage factors wrote nothing"):
        publish(context)
    assert not context.published.exists()


def test_a_folder_that_cannot_be_written_is_named(context):
    (context.root / ".work").touch()
    with pytest.raises(StorageError, match=r"cannot write .*out: .*run again"):
        prepare(context)


def test_a_result_that_cannot_be_published_is_kept(context):
    prepare(context)
    (context.out / "new").touch()
    (context.root / "artifacts").touch()
    with pytest.raises(StorageError, match=r"the finished work is in .*out"):
        publish(context)
    assert (context.out / "new").exists()


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_snippet_shows_the_strongest_token(width):
    tokens = [f"word{index} " for index in range(40)]
    for strongest in (0, 17, 39):
        influence = [0.1] * 40
        influence[strongest] = -3.0
        shown = snippet(tokens, influence, width)
        assert len(shown) <= width
        assert f"word{strongest}" in shown


def test_a_text_on_one_line_and_short_enough_is_shown_whole():
    assert snippet(["a\n\n", "b"], [0.0, 1.0], 80) == "a b" == flat("a\n\nb")


def test_a_query_is_told_with_what_it_is_held_against():
    assert said({"completion": " cat."}) == said({"completion": " cat.", "contrast": None})
    assert said({"completion": " cat.", "contrast": " dog."}).endswith("(rather than dog.)")


TOP = {
    "query": "string", "sign": "string", "rank": "int64", "sequence": "string", "group": "int64",
    "influence": "float64", "tokens": "list<string>", "token_influence": "list<float>",
}  # fmt: skip


def test_a_group_of_duplicates_is_one_line_and_opens_on_demand(context):
    folder = context.root / "artifacts" / context.run
    groups = (4, 4, 9, 4, 2)
    rows = [
        ("park", "+", rank, f"ts-{rank}", group, 1 / rank, ["a story"], [1.0])
        for rank, group in enumerate(groups, start=1)
    ]
    columns = dict(zip(TOP, map(list, zip(*rows, strict=True)), strict=True))
    store.write_table(folder / "score/top.parquet", columns, TOP)
    query = {"name": "park", "prompt": "To the", "completion": " park"}
    store.write_json(folder / "query/queries.json", [query])

    def shown(**more):
        lines = list(top_lines(context.root, context.run, limit=2, **more))[3:]
        return [(line.split()[1], "near duplicate" in line) for line in lines]

    assert shown() == [("ts-1", True), ("ts-3", False)]
    assert shown(duplicates=True) == [
        ("ts-1", True), ("ts-2", False), ("ts-4", False), ("ts-3", False),
    ]  # fmt: skip
    assert [
        (row["sequence"], row["near duplicates"]) for row in top_rows(context.root, context.run, 2)
    ] == [("ts-1", 2), ("ts-3", 0)]
