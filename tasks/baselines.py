"""Baselines that need no curvature: BM25 over words, TF-IDF over tokens, gradient dot product."""

from collections.abc import Sequence
from typing import cast

import bm25s
import torch
from jaxtyping import Float
from torch import Tensor

from influence.statistics import Agreement
from tasks import store
from tasks.attributed import PassReference
from tasks.models import load_tokenizer
from tasks.prepared import EKFAC, GRADIENT_DOT
from tasks.ranking import Influences, ranks
from tasks.sequences import TokenStore
from tasks.workspace import StageContext

SCHEMA = {
    "query": "string",
    "row": "int64",
    "bm25": "float64",
    "bm25_rank": "int64",
    "tfidf": "float64",
    "tfidf_rank": "int64",
    "gradient_dot": "float64",
    "gradient_dot_rank": "int64",
}


def baseline_scores(
    context: StageContext, reference: PassReference, influences: Influences
) -> dict[str, Float[Tensor, "q n"]]:
    """Scores of every query and candidate by method, rows as in `influences`."""
    return {
        "bm25": bm25_scores(context, reference, influences.rows.tolist()),
        "tfidf": tfidf_scores(context, influences),
        "gradient_dot": influences.of(GRADIENT_DOT),
    }


def bm25_scores(
    context: StageContext, reference: PassReference, rows: Sequence[int]
) -> Float[Tensor, "q n"]:
    """Okapi BM25 (k₁ = 1.5, b = 0.75) over lower-case words; statistics from the candidates."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    tokenizer = load_tokenizer(reference.model.folder)
    texts = tokenizer.batch_decode(
        [tokens.row_tokens(row).tolist() for row in rows], skip_special_tokens=True
    )
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(_words(texts), show_progress=False)
    queries = store.read_json(context.artifact("query") / "queries.json")
    words = _words([query["prompt"] + query["completion"] for query in queries])
    return torch.stack([torch.as_tensor(index.get_scores(each)).double() for each in words])


def _words(texts: Sequence[str]) -> list[list[str]]:
    found = bm25s.tokenize(list(texts), stopwords=[], return_ids=False, show_progress=False)
    return cast(list[list[str]], found)


def tfidf_scores(context: StageContext, influences: Influences) -> Float[Tensor, "q n"]:
    """What stage `filter` scored."""
    table = store.read_table(context.artifact("filter") / "tfidf.parquet", ["tfidf"])
    scores = torch.from_numpy(table["tfidf"].to_numpy().copy())
    return scores.reshape(len(influences.queries), -1)


def write_baselines(
    context: StageContext, influences: Influences, scores: dict[str, Float[Tensor, "q n"]]
) -> None:
    """One row a query and candidate: each baseline's score and rank."""
    columns: dict[str, object] = {
        "query": [name for name in influences.queries for _ in range(len(influences.rows))],
        "row": influences.rows.repeat(len(influences.queries)),
    }
    for method, values in scores.items():
        columns[method] = values.flatten()
        columns[f"{method}_rank"] = ranks(values).flatten()
    store.write_table(context.out / "baselines.parquet", columns, SCHEMA)


def agreements(
    influences: Influences, scores: dict[str, Float[Tensor, "q n"]], seed: int
) -> dict[str, Agreement]:
    """How far each baseline orders the candidates as EK-FAC does."""
    return {
        method: Agreement.of(influences.of(EKFAC), values, seed)
        for method, values in scores.items()
    }
