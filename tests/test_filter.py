"""The TF-IDF filter: hand values, who is selected, and what shards may not change."""

import math
from pathlib import Path

import numpy as np
import pytest

# Modules, not names: a stage's module is what `run_stage` is given.
from tasks import filter, store, tokenize, train
from tasks.params import NoFilter, Tfidf
from tasks.querysets import load_queries
from tasks.sequences import TokenStore
from tests.small_run import SECTIONS, run_stage, write_lines

WORDS = ["red", "blue", "ball", "cat", "tree", "sun", "dog", "sea"]
STORIES = [
    {"id": f"s{n}", "text": f"A {WORDS[n % 8]} and a {WORDS[n // 8]}. It was day {n}."}
    for n in range(40)
]
QUERIES = [
    {"name": "ball", "prompt": "The red", "completion": " ball and the red cat"},
    {"name": "sea", "prompt": "The sun", "completion": " is on the sea."},
]


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("filter")
    write_lines(root / "corpus.jsonl", STORIES)
    write_lines(root / "queries.jsonl", QUERIES)
    run_stage(root, "train", train)
    run_stage(root, "tokenize", tokenize)
    return root


def filtered(root: Path, **sections) -> tuple[list[dict], list[dict]]:
    folder = run_stage(root, "filter", filter, **sections)
    return tuple(
        store.read_table(folder / f"{name}.parquet").to_pylist() for name in ("candidates", "tfidf")
    )


def slow_scores(root: Path, terms: str = "tokens") -> dict[tuple[str, int], float]:
    """Eq. 28 and 29 as printed, with k₁ = 1.5, over sets of tokens or of words."""
    tokens = TokenStore.open(root / "artifacts/small/tokenize")
    if terms == "tokens":
        held = [set(tokens.row_tokens(row).tolist()) for row in range(tokens.num_sequences)]
    else:
        held = [split_words(story["text"]) for story in STORIES]
    queries = load_queries(
        root / "queries.jsonl", filter.load_tokenizer(train_folder(root)), False, None
    )
    k1 = 1.5
    scores = {}
    for query in queries:
        for row, sequence in enumerate(held):
            total = 0.0
            text = split_words(query.prompt + query.completion)
            asked = [*query.prompt_tokens, *query.completion_tokens]
            for token in asked if terms == "tokens" else text:
                exists = float(token in sequence)
                count = sum(token in other for other in held)
                idf = math.log((len(held) - count + 0.5) / (count + 0.5) + 1)
                total += (k1 + 1) * exists / (k1 + exists) * idf
            scores[query.name, row] = total
    return scores


def split_words(text: str) -> list[str]:
    return text.lower().replace(".", " ").split()


def train_folder(root: Path) -> Path:
    return filter.read_reference(root / "artifacts/small/train", root).folder


@pytest.mark.parametrize("terms", ["tokens", "words"])
def test_scores_are_those_of_the_printed_formula(tokenized, terms):
    settings = {"method": "tfidf", "terms": terms, "top": 5, "audit": 4, "seed": 0}
    candidates, table = filtered(tokenized, filter=settings)
    slow = slow_scores(tokenized, terms)
    for entry in table:
        assert entry["tfidf"] == pytest.approx(slow[entry["query"], entry["row"]], rel=1e-12)
    assert len(table) == len(candidates) * len(QUERIES)


def test_top_of_every_query_and_an_audit_of_the_rest_are_candidates(tokenized):
    settings = {"method": "tfidf", "terms": "tokens", "top": 5, "audit": 4, "seed": 0}
    candidates, table = filtered(tokenized, filter=settings)
    slow = slow_scores(tokenized)
    best = set()
    for query in ("ball", "sea"):
        order = sorted(range(40), key=lambda row: (-round(slow[query, row], 9), row))
        selected = {e["row"] for e in table if e["query"] == query and e["selected"]}
        assert selected == set(order[:5])
        for entry in table:
            if entry["query"] == query:
                assert order[entry["rank"] - 1] == entry["row"]
        best |= selected
    assert {c["row"] for c in candidates if not c["audit"]} == best
    audited = {c["row"] for c in candidates if c["audit"]}
    assert len(audited) == 4
    assert not audited & best
    assert {c["rejected_total"] for c in candidates} == {40 - len(best)}
    keys = TokenStore.open(tokenized / "artifacts/small/tokenize").keys
    assert all(c["key"] == keys[c["row"]] for c in candidates)
    assert [c["row"] for c in candidates] == sorted(c["row"] for c in candidates)


def test_number_of_shards_changes_no_byte(tokenized):
    contents = []
    for shards in (1, 2, 7):
        runtime = SECTIONS["runtime"] | {"shards": shards}
        folder = run_stage(tokenized, "filter", filter, runtime=runtime)
        contents.append({file.name: store.digest(file) for file in folder.iterdir()})
    assert len(contents[0]) == 2
    assert contents[0] == contents[1] == contents[2]


def test_method_none_keeps_every_sequence(tokenized):
    candidates, table = filtered(tokenized, filter={"method": "none"})
    assert [c["row"] for c in candidates] == list(range(40))
    assert {(c["audit"], c["rejected_total"]) for c in candidates} == {(False, 0)}
    assert all(entry["selected"] for entry in table)
    assert len(table) == 80


def test_more_candidates_than_sequences_selects_all_and_audits_none(tokenized):
    settings = {"method": "tfidf", "terms": "tokens", "top": 500, "audit": 7, "seed": 0}
    candidates, _ = filtered(tokenized, filter=settings)
    assert len(candidates) == 40
    assert not any(c["audit"] for c in candidates)


def test_ties_go_to_the_smaller_row_even_when_rounding_differs():
    scores = np.array([1.0, 2.0 + 1e-13, 2.0, 2.0 + 2e-13, 3.0])
    assert filter.ranks(scores).tolist() == [5, 2, 3, 4, 1]


def test_audit_is_drawn_from_the_rejected_alone_and_fixed_by_its_seed():
    ranked = [np.array([1, 2, 3, 4, 5, 6]), np.array([6, 5, 4, 3, 2, 1])]

    def chosen(seed: int, audit: int = 3):
        settings = Tfidf(method="tfidf", terms="tokens", top=1, audit=audit, seed=seed)
        return [rows.tolist() for rows in filter.choose_candidates(ranked, settings)]

    assert chosen(0)[0] == [0, 5]
    assert set(chosen(0)[1]) < {1, 2, 3, 4}
    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)[1]) for seed in range(20)}) > 1
    assert chosen(0, audit=9)[1] == [1, 2, 3, 4]
    assert filter.choose_candidates(ranked, NoFilter(method="none"))[1].tolist() == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"completion": ""}, r"queries\.jsonl:1: the query's completion is empty"),
        ({"prompt": "red " * 600}, r"queries\.jsonl:1: .* more than the context of 512"),
    ],
)
def test_bad_query_stops_the_stage_before_any_shard(tokenized, tmp_path, query, message):
    file = write_lines(tmp_path / "queries.jsonl", [QUERIES[0] | query])
    section = SECTIONS["query"] | {"path": str(file)}
    with pytest.raises(ValueError, match=message):
        run_stage(tokenized, "filter", filter, query=section)
    assert not list((tokenized / ".work").glob("*filter*/count*"))
