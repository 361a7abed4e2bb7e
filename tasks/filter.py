"""Stage `filter`: which sequences are scored (TF-IDF, Grosse et al. 2023, Eq. 28-29).

Most of a corpus shares no rare token with a query. Keeping the nearest by TF-IDF saves most of
the passes, and hides influence that shares no words; so a random audit of what was rejected goes
along, from which `validate` measures what was missed.

Terms are the model's tokens, as in the paper, or lower-case words: with a small vocabulary tokens
are pieces of words, and nearly every piece is in nearly every sequence.
"""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influence.tfidf import DocumentFrequency, presence, tfidf_scores
from tasks import store
from tasks.checkpoints import read_reference
from tasks.expected import expected_targets
from tasks.generated import queries_of
from tasks.models import load_tokenizer
from tasks.params import Filter, RunParams, Tfidf
from tasks.querysets import QueryText
from tasks.sequences import TokenStore, choose_rows
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.workspace import StageContext

_ROWS_AT_ONCE = 4096  # bounds the table of which sequence holds which query token
# Ranks compare rounded scores: the same terms summed in another order must stay a tie.
_DECIMALS = 9
_WORD = re.compile(r"\w+")

Term = int | str  # a token, or a word


def run(context: StageContext) -> None:
    """Score every sequence against every query; write the candidates and their scores.

    With method `none` every sequence is a candidate; the scores are written as a baseline.

    Raises:
        ValueError: queries that cannot be measured (file and line), or that expect what the corpus
            does not hold.
    """
    params = context.params
    tokens = TokenStore.open(context.artifact("tokenize"))
    model = read_reference(context.artifact("train"), context.root)
    queries = queries_of(context, model)
    expected_targets(queries, context.artifact("tokenize"), params.query.path)
    shards = shards_of(tokens.shard_rows(range(tokens.num_sequences), params.runtime.shards))
    searched = [query_terms(query, params) for query in queries]
    terms = sorted({term for query in searched for term in query})
    counts = map_shards(context, count_shard, shards, name="count", terms=terms)
    idf = reduce(add, map(_read_frequency, counts)).idf()[: len(terms)].tolist()
    parts = map_shards(
        context, score_shard, shards, name="score", queries=searched, terms=terms, idf=idf
    )
    scores = torch.cat([store.read_tensor(part, "scores") for part in parts], dim=1).numpy()
    _write(context, queries, tokens, scores)


def query_terms(query: QueryText, params: RunParams) -> list[Term]:
    """The terms of prompt and completion, repeated ones again."""
    if _by_words(params):
        return words(query.prompt + query.completion)
    # BOS begins every sequence, so it tells none from another.
    return [*query.prompt_tokens[int(params.tokenize.bos) :], *query.completion_tokens]


def words(text: str) -> list[Term]:
    """Lower-case runs of letters, digits and underscores."""
    return list(_WORD.findall(text.lower()))


def _by_words(params: RunParams) -> bool:
    return isinstance(params.filter, Tfidf) and params.filter.terms == "words"


def sequence_terms(context: StageContext, terms: Sequence[Term]) -> Callable[[int], Tensor]:
    """By row: the places in `terms` of what the sequence holds, one past them for all else."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    if not _by_words(context.params):
        sought = torch.tensor(terms)

        def of_tokens(row: int) -> Tensor:
            held = tokens.row_tokens(row).long()
            place = torch.searchsorted(sought, held).clamp(max=len(terms) - 1)
            return torch.where(sought[place] == held, place, len(terms))

        return of_tokens
    known = {term: place for place, term in enumerate(terms)}
    model = read_reference(context.artifact("train"), context.root)
    tokenizer = load_tokenizer(model.folder)

    def of_words(row: int) -> Tensor:
        [text] = tokenizer.batch_decode([tokens.row_tokens(row).tolist()], skip_special_tokens=True)
        places = [known.get(word, len(terms)) for word in set(words(text))]
        return torch.tensor(places, dtype=torch.int64)

    return of_words


def count_shard(context: StageContext, shard: ShardRef, path: Path, terms: list[Term]) -> None:
    """In how many of the shard's sequences each term of the queries occurs."""
    held = sequence_terms(context, terms)
    frequency = DocumentFrequency.of(map(held, shard.counted()), len(terms) + 1)
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
    queries: list[list[Term]],
    terms: list[Term],
    idf: list[float],
) -> None:
    """TF-IDF of every query with the shard's sequences, float64 `q n`.

    Args:
        context: of the stage.
        shard: rows of the corpus.
        path: where to.
        queries: terms of each query.
        terms: those that occur in any query, sorted; no other counts towards a score.
        idf: of each term.
    """
    held = sequence_terms(context, terms)
    known = {term: place for place, term in enumerate(terms)}
    # All other terms share one place past these, with weight 0.
    weights = torch.tensor([*idf, 0.0], dtype=torch.float64)
    places = [[known[term] for term in query] for query in queries]
    renumbered = [torch.tensor(place, dtype=torch.int64) for place in places]
    blocks = []
    for start in range(0, len(shard.items), _ROWS_AT_ONCE):
        rows = shard.items[start : start + _ROWS_AT_ONCE]
        table = presence([held(row) for row in rows], len(weights))
        blocks.append(torch.stack([tfidf_scores(query, table, weights) for query in renumbered]))
        shard.tick(len(rows))
    store.write_tensors(path, {"scores": torch.cat(blocks, dim=1)})


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
