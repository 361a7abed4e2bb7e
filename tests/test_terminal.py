"""The lines of `python -m flows top`: what the files say, on a width that a terminal has."""

from pathlib import Path

import pytest

from tasks import store
from tasks.tables import TOP
from tasks.terminal import top_lines


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts/small"
    queries = [
        {"name": "lily", "prompt": "A girl\nnamed", "completion": " Lily.", "generated": True},
        {"name": "tom", "prompt": "A boy named", "completion": " Tom.", "contrast": " Ben."},
    ]
    store.write_json(folder / "query/queries.json", queries)
    row = {
        **{"query": "lily", "sign": "+", "rank": 1, "row": 0, "key": 1, "sequence": "ts-0"},
        **{"documents": ["ts-0"], "metadata": "{}", "influence": 0.25, "influence_low_rank": 0.2},
        **{"group": 0},
        **{"layers": [0.25], "tokens": ["Lily", " ran."], "token_influence": [0.2, 0.05]},
        **{"layer_token_influence": [[0.2, 0.05]], "sparsity": 0.5},
    }
    store.write_table(folder / "score/top.parquet", {key: [row[key]] for key in TOP}, TOP)
    return tmp_path


def test_each_query_with_its_sequences(root):
    lines = list(top_lines(root, "small"))
    assert "lily: A girl named → Lily. (generated)" in lines
    assert "tom: A boy named → Tom. (rather than Ben.)" in lines
    assert "   +2.50e-01  ts-0              Lily ran." in lines
    assert not [line for line in lines if "expected" in line]
    with pytest.raises(ValueError, match=r"no query named like 'ghost'; it has lily, tom"):
        list(top_lines(root, "small", "ghost"))


def test_what_a_query_expects_stands_below_it(root):
    expected = {
        "methods": {
            "ekfac": {"recall_10": 0.5, "recall_100": 0.5, "mrr": 0.25},
            "bm25": {"recall_10": 0.0, "recall_100": 0.5, "mrr": 0.0625},
        },
        "targets": [
            {"name": "ts-4", "ranks": {"ekfac": 4, "bm25": 16}},
            {"name": "ts-9", "ranks": {"ekfac": None, "bm25": None}},
        ],
    }
    file = root / "artifacts/small/validate/expected.json"
    store.write_json(file, {"num_queries": 1, "queries": {"lily": expected}})
    lines = list(top_lines(root, "small"))
    assert lines[lines.index("lily: A girl named → Lily. (generated)") + 1] == (
        "  expected: ts-4 #4, ts-9 not scored (filtered out); recall at 10 50% (BM25 0%), "
        "reciprocal rank 0.25 (0.062)"
    )
