"""What queries expect to find: looked up in the corpus, then in rankings computed by hand."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import filter, store, tokenize, train
from tasks.expected import Target, expected_targets
from tasks.retrieval import expected_means, found_expected
from tests.small_run import SECTIONS, run_stage, write_lines

DOCUMENTS = [
    {"id": "a", "text": "Lily went to the park with her big red ball. " * 12, "title": "Park"},
    {"id": "b", "text": "Tom has a cat.", "title": "Cat", "year": 2020},
    {"id": "c", "text": "Tom has a dog.", "title": "Dog", "year": 2020},
    {"id": "d", "text": "The sun was warm.", "title": "Sun", "year": 2021},
]


@dataclass(frozen=True)
class Asked:
    name: str
    expected: list[Any] = field(default_factory=list)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("expected")
    write_lines(root / "corpus.jsonl", DOCUMENTS)
    run_stage(root, "train", train)
    run_stage(root, "tokenize", tokenize)
    return root


@pytest.fixture(scope="module")
def folder(root) -> Path:
    return root / "artifacts/small/tokenize"


def names(folder: Path) -> list[str]:
    return store.read_table(folder / "sequences.parquet", ["sequence"])["sequence"].to_pylist()


def test_ids_and_matches_become_rows_and_each_document_counts_once(folder):
    rows = {name: row for row, name in enumerate(names(folder))}
    windows = tuple(row for name, row in rows.items() if name.startswith("a"))
    assert len(windows) > 2
    second = names(folder)[1]
    assert second == "a@64"
    targets = expected_targets(
        [
            Asked("none"),
            Asked("document", ["a"]),
            Asked("window", [second]),
            Asked("match", [{"title": "Dog"}]),
            Asked("several", [{"year": 2020}, "b", {"title": "Cat", "year": 2020}]),
        ],
        folder,
        "q.jsonl",
    )
    assert targets == {
        "document": [Target("a", windows)],
        "window": [Target("a@64", (1,))],
        "match": [Target("c", (rows["c"],))],
        "several": [Target("b", (rows["b"],)), Target("c", (rows["c"],))],
    }


def test_what_the_corpus_does_not_hold_is_named_before_anything_is_scored(root, folder):
    queries = [Asked("x", ["a", "ghost", {"title": "Cat", "year": 1999}])]
    with pytest.raises(
        ValueError,
        match=r"q\.jsonl: query 'x' expects 'ghost', \{'title': 'Cat', 'year': 1999\}, which no",
    ):
        expected_targets(queries, folder, "q.jsonl")
    many = [Asked("x", [f"ghost {n}" for n in range(9)])]
    with pytest.raises(ValueError, match=r"'ghost 4' and 4 more, which no document"):
        expected_targets(many, folder, "q.jsonl")
    line = {"name": "x", "prompt": "Tom has", "completion": " a cat.", "expected": ["ghost"]}
    write_lines(root / "queries.jsonl", [line])
    with pytest.raises(ValueError, match=r"queries\.jsonl: query 'x' expects 'ghost'"):
        run_stage(root, "filter", filter, query=SECTIONS["query"])
    assert not list((root / ".work").glob("*filter*/count*"))


def test_recall_and_reciprocal_rank_by_hand():
    """Two queries and 120 candidates, which are the even rows, scored downwards or alike."""
    rows = list(range(0, 240, 2))
    downwards = torch.linspace(1, -1, 120, dtype=torch.float64)
    scores = {
        "ekfac": torch.stack([downwards, downwards.flip(0)]),
        "bm25": torch.zeros(2, 120, dtype=torch.float64),
    }
    targets = {
        "first": [
            Target("best", (0,)),  # rank 1
            Target("windows", (100, 20, 230)),  # ranks 51, 11 and 116: the best is 11
            Target("far", (238,)),  # rank 120
            Target("rejected", (1, 3)),  # odd rows are no candidates
        ],
        "third": [Target("partly", (5, 232))],  # of the second row of scores: rank 4
    }
    found = found_expected(["first", "third"], targets, rows, scores)
    first, third = found["queries"]["first"], found["queries"]["third"]
    assert [each["ranks"] for each in first["targets"]] == [
        {"ekfac": 1, "bm25": 120},
        {"ekfac": 11, "bm25": 120},
        {"ekfac": 120, "bm25": 120},
        {"ekfac": None, "bm25": None},
    ]
    assert (first["num_expected"], first["num_filtered"]) == (4, 1)
    assert first["methods"]["ekfac"] == {"recall_10": 0.25, "recall_100": 0.5, "mrr": 1.0}
    assert first["methods"]["bm25"] == {"recall_10": 0, "recall_100": 0, "mrr": 1 / 120}
    assert third["targets"][0]["ranks"]["ekfac"] == 4
    assert third["methods"]["ekfac"] == {"recall_10": 1, "recall_100": 1, "mrr": 1 / 4}
    assert expected_means(found) == {
        "num_queries": 2,
        "num_expected": 5,
        "num_filtered": 1,
        "ekfac": {"recall_10": 0.625, "recall_100": 0.75, "mrr": 0.625},
        "bm25": {"recall_10": 0, "recall_100": 0, "mrr": pytest.approx(1 / 120)},
    }
    json.dumps(found, allow_nan=False)


def test_the_scores_of_a_query_are_those_of_its_place():
    scores = {"ekfac": torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64)}
    found = found_expected(["one", "two"], {"two": [Target("c", (2,))]}, [0, 1, 2], scores)
    assert found["queries"]["two"]["targets"][0]["ranks"] == {"ekfac": 1}
    assert found["num_queries"] == 1


def test_a_run_that_expects_nothing_has_no_numbers():
    found = found_expected(["one"], {}, [0], {"ekfac": torch.zeros(1, 1)})
    assert found == {"num_queries": 0, "queries": {}}
    assert expected_means(found) == {}
