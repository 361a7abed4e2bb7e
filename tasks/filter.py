"""Stage `filter`: which sequences are scored (TF-IDF over tokens, Grosse et al. 2023, Eq. 28-29).

Most of a corpus shares no rare token with a query. Keeping the nearest by TF-IDF saves most of
the passes, and hides influence that shares no words; so a random audit of what was rejected goes
along, from which `validate` measures what was missed.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from influence.tfidf import DocumentFrequency, presence, tfidf_scores
from tasks import store
from tasks.checkpoints import read_reference
from tasks.models import load_tokenizer
from tasks.params import Filter, Tfidf
from tasks.querysets import QueryText, load_queries
from tasks.sequences import TokenStore, choose_rows
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.workspace import StageContext

_ROWS_AT_ONCE = 4096  # bounds the table of which sequence holds which query token
# Ranks compare rounded scores: the same terms summed in another order must stay a tie.
_DECIMALS = 9


def run(context: StageContext) -> None:
    """Score every sequence against every query; write the candidates and their scores.

    With method `none` every sequence is a candidate; the scores are written as a baseline.

    Raises:
        ValueError: queries that cannot be measured (file and line).
    """
    params = context.params
    tokens = TokenStore.open(context.artifact("tokenize"))
    model = read_reference(context.artifact("train"), context.root)
    bos = params.tokenize.bos
    queries = load_queries(
        context.input(params.query.path), load_tokenizer(model.folder), bos, model.context
    )
    shards = shards_of(tokens.shard_rows(range(tokens.num_sequences), params.runtime.shards))
    counts = map_shards(context, count_shard, shards, name="count", vocabulary=model.vocabulary)
    idf = reduce(add, map(_read_frequency, counts)).idf()
    # BOS begins every sequence, so it tells none from another.
    searched = [[*q.prompt_tokens[int(bos) :], *q.completion_tokens] for q in queries]
    terms = sorted({token for query in searched for token in query})
    parts = map_shards(
        context,
        score_shard,
        shards,
        name="score",
        queries=searched,
        terms=terms,
        idf=idf[terms].tolist(),
    )
    scores = torch.cat([store.read_tensor(part, "scores") for part in parts], dim=1).numpy()
    _write(context, queries, tokens, scores)


def count_shard(context: StageContext, shard: ShardRef, path: Path, vocabulary: int) -> None:
    """In how many of the shard's sequences each token occurs."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    frequency = DocumentFrequency.of(map(tokens.row_tokens, shard.items), vocabulary)
    store.write_tensors(
        path,
        {
            "counts": frequency.counts,
            "num_documents": torch.tensor(frequency.num_documents),
        },
    )


def _read_frequency(path: Path) -> DocumentFrequency:
    found = store.read_tensors(path)
    return DocumentFrequency(found["counts"], int(found["num_documents"]))


def score_shard(
    context: StageContext,
    shard: ShardRef,
    path: Path,
    queries: list[list[int]],
    terms: list[int],
    idf: list[float],
) -> None:
    """TF-IDF of every query with the shard's sequences, float64 `q n`.

    Args:
        context: of the stage.
        shard: rows of the corpus.
        path: where to.
        queries: tokens of each query.
        terms: the tokens that occur in any query; no other counts towards a score.
        idf: of each term.
    """
    tokens = TokenStore.open(context.artifact("tokenize"))
    known = {token: place for place, token in enumerate(terms)}
    # All other tokens share one place past the terms, with weight 0.
    weights = torch.tensor([*idf, 0.0], dtype=torch.float64)
    renumbered = [torch.tensor([known[token] for token in query]) for query in queries]
    blocks = []
    for start in range(0, len(shard.items), _ROWS_AT_ONCE):
        rows = shard.items[start : start + _ROWS_AT_ONCE]
        held = presence([_renumber(tokens.row_tokens(row), terms) for row in rows], len(weights))
        blocks.append(torch.stack([tfidf_scores(query, held, weights) for query in renumbered]))
    store.write_tensors(path, {"scores": torch.cat(blocks, dim=1)})


def _renumber(tokens: torch.Tensor, terms: list[int]) -> torch.Tensor:
    """Each token's place among the sorted terms, or one past them."""
    sought = torch.tensor(terms)
    place = torch.searchsorted(sought, tokens.long()).clamp(max=len(terms) - 1)
    return torch.where(sought[place] == tokens, place, len(terms))


def ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank 1 for the highest score; among equals, the smaller row comes first."""
    order = np.argsort(-scores.round(_DECIMALS), kind="stable")
    found = np.empty(len(scores), np.int64)
    found[order] = np.arange(1, len(scores) + 1)
    return found


def choose_candidates(
    ranked: Sequence[NDArray[np.int64]], settings: Filter
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that any query selects, and a random audit of the rows that none does.

    Args:
        ranked: each query's rank of every sequence.
        settings: how many a query selects, and how many are audited.

    Returns:
        Rows selected, rows audited; both ascending.
    """
    rows = np.arange(len(ranked[0]))
    if not isinstance(settings, Tfidf):
        return rows, rows[:0]
    selected = np.any([rank <= settings.top for rank in ranked], axis=0)
    rejected = rows[~selected].tolist()
    audited = choose_rows(rejected, settings.audit, settings.seed)
    return rows[selected], np.array(audited, np.int64)


def _write(
    context: StageContext,
    queries: Sequence[QueryText],
    tokens: TokenStore,
    scores: NDArray[np.float64],
) -> None:
    settings = context.params.filter
    ranked = [ranks(score) for score in scores]
    selected, audited = choose_candidates(ranked, settings)
    rows = np.union1d(selected, audited)
    store.write_table(
        context.out / "candidates.parquet",
        {
            "row": rows,
            "key": tokens.keys[rows],
            "audit": np.isin(rows, audited),
            "rejected_total": np.full(len(rows), tokens.num_sequences - len(selected)),
        },
        {"row": "int64", "key": "int64", "audit": "bool", "rejected_total": "int64"},
    )
    top = settings.top if isinstance(settings, Tfidf) else tokens.num_sequences
    rank = np.concatenate([each[rows] for each in ranked])
    store.write_table(
        context.out / "tfidf.parquet",
        {
            "query": [query.name for query in queries for _ in rows],
            "row": np.tile(rows, len(queries)),
            "tfidf": scores[:, rows].ravel(),
            "rank": rank,
            "selected": rank <= top,
        },
        {
            "query": "string",
            "row": "int64",
            "tfidf": "float64",
            "rank": "int64",
            "selected": "bool",
        },
    )
