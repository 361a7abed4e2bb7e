"""Exports keep to the schema of the program that they are for."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main
from tasks import store
from tasks.interchange import tda_lines

TOP = {
    "query": "string", "sign": "string", "rank": "int64", "sequence": "string",
    "influence": "float64", "tokens": "list<string>",
}  # fmt: skip
# Chang et al. 2024, README of github.com/PAIR-code/pretraining-tda.
SCHEMA = {
    "example_id": str,
    "query_set": str,
    "inputs_plaintext": str,
    "targets_plaintext": str,
    "proponents": [str],
    "proponent_ids": [str],
    "proponent_scores": [float],
    "opponents": [str],
    "opponent_ids": [str],
    "opponent_scores": [float],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = [
        ("park", "+", 2, "s2", 1e-6, ["so", " far"]),
        ("toy", "-", 1, "s1", -3e-6, ["no"]),
        ("park", "+", 1, "s1@64", 2e-6, ["\u201eé", "\n"]),
        ("park", "-", 1, "s3", -5e-7, ["<s>", "x"]),
    ]
    columns = dict(zip(TOP, map(list, zip(*rows, strict=True)), strict=True))
    folder = tmp_path / "artifacts/small"
    store.write_table(folder / "score/top.parquet", columns, TOP)
    query = {"prompt": "To the", "prompt_tokens": [1], "completion_tokens": [2]}
    queries = [
        query | {"name": "toy", "completion": " toy", "contrast": " cat", "contrast_tokens": [3]},
        query | {"name": "park", "completion": " park", "category": "places", "query_set": "x"},
        query | {"name": "none", "completion": " none"},
    ]
    store.write_json(folder / "query/queries.json", queries)
    (tmp_path / "dvc.yaml").touch()
    return tmp_path


def exported(root: Path, **more: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tda_lines(root, "small", **more)]


def test_every_line_has_the_keys_of_the_schema_in_their_types(root: Path) -> None:
    for line in exported(root):
        for key, kind in SCHEMA.items():
            if isinstance(kind, list):
                assert all(type(each) is kind[0] for each in line[key]), key
            else:
                assert type(line[key]) is kind, key
        for side in ("proponent", "opponent"):
            lengths = {len(line[f"{side}{part}"]) for part in ("s", "_ids", "_scores")}
            assert len(lengths) == 1


def test_lists_are_of_their_query_and_sign_and_in_the_order_of_the_ranks(root: Path) -> None:
    toy, park, none = exported(root)
    assert [toy["example_id"], park["example_id"], none["example_id"]] == ["toy", "park", "none"]
    assert park["proponents"] == ["\u201eé\n", "so far"]
    assert park["proponent_ids"] == ["s1@64", "s2"]
    assert park["proponent_scores"] == [2e-6, 1e-6]
    assert park["opponents"] == ["<s>x"]
    assert toy["proponents"] == none["opponents"] == []


def test_fields_of_the_query_set_go_along_and_replace_nothing(root: Path) -> None:
    toy, park, _ = exported(root)
    assert (park["category"], park["query_set"], toy["contrast"]) == ("places", "small", " cat")
    assert "contrast" in toy["score_unit"]
    assert "contrast" not in park["score_unit"]
    assert not {key for key in park if key.endswith("_tokens")}


def test_scores_come_in_the_unit_asked_for(root: Path) -> None:
    _, park, _ = exported(root, unit="micronats")
    assert park["proponent_scores"] == pytest.approx([2, 1])
    assert park["score_unit"].startswith("micronats")
    with pytest.raises(ValueError, match=r"unit is 'bits'; one of nats, millinats, micronats"):
        exported(root, unit="bits")


def test_the_command_writes_a_file_or_prints(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr("flows.environment.set_environment", lambda root: None)
    assert main(["export", "small"]) == 0
    printed = capsys.readouterr().out
    assert main(["export", "small", "--output", "out.jsonl"]) == 0
    assert Path("out.jsonl").read_text(encoding="utf-8") == printed
    assert main(["export", "absent"]) == 1
    assert "does not exist" in capsys.readouterr().err
