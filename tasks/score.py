"""Stage `score`: rank the candidates, and score the top again at full rank, token by token."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence.scores import TopK
from influence.statistics import pearson
from influence.tokens import rescore
from tasks import store
from tasks.attributed import PassReference
from tasks.duplicates import duplicate_groups
from tasks.models import load_tokenizer
from tasks.prepared import (
    EKFAC,
    described_query,
    prepare_queries,
    read_prepared,
    write_prepared,
)
from tasks.provenance import header
from tasks.ranking import Influences, ranks, read_influences
from tasks.sequences import TokenStore, choose_rows
from tasks.shards import ShardRef, map_shards, shards_of, split
from tasks.tables import write_duplicates, write_scores, write_self_influence, write_top
from tasks.workspace import StageContext


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence that is to be scored again for a query, and told token by token."""

    query: int
    row: int


def run(context: StageContext) -> None:
    """Write scores, top, duplicates, summary and, if asked for, self-influence."""
    reference = PassReference.of(context)
    corpus = store.read_json(context.artifact("tokenize") / "summary.json")
    influences = read_influences(context.artifact("stream"), corpus["num_sequences"])
    score = context.params.score
    pairs = top_pairs(influences, score.top)
    controls = choose_rows(influences.rows.tolist(), score.control, score.seed)
    parts = rescore_all(context, pairs, controls, corpus["num_sequences"])
    full = {key: value for part in parts for key, value in store.read_tensors(part).items()}
    write_scores(context, influences, ranks(influences.scores))
    if influences.self_influence is not None:
        write_self_influence(context, influences.rows, influences.self_influence)
    groups = find_duplicates(context, reference, influences.rows.tolist())
    write_duplicates(context, groups)
    write_top(context, reference, influences, pairs, full, groups)
    summary = {
        **header(context, reference),
        "rescore": full_rank_agreement(influences, full, controls),
        "duplicates": count_duplicates(groups),
    }
    store.write_json(context.out / "summary.json", summary)


def find_duplicates(
    context: StageContext, reference: PassReference, rows: list[int]
) -> dict[int, int]:
    """For each candidate the first of the corpus, among them, that says the same."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    tokenizer = load_tokenizer(reference.model.folder)
    texts = (
        str(tokenizer.decode(tokens.row_tokens(row).tolist(), skip_special_tokens=True))
        for row in rows
    )
    return dict(zip(rows, (rows[place] for place in duplicate_groups(texts)), strict=True))


def count_duplicates(groups: dict[int, int]) -> dict[str, int]:
    """Candidates, and how many of them repeat an earlier one."""
    return {
        "num_candidates": len(groups),
        "num_repeated": sum(row != first for row, first in groups.items()),
    }


def top_pairs(influences: Influences, k: int) -> list[Pair]:
    """The k highest and the k lowest of each query by EK-FAC, as (query, row)."""
    scores = influences.of(EKFAC)
    best = TopK.of(influences.rows, scores, k).ids
    worst = TopK.of(influences.rows, -scores, k).ids
    return [
        Pair(query, row)
        for query in range(len(influences.queries))
        for row in sorted({*best[query].tolist(), *worst[query].tolist()})
    ]


def rescore_all(
    context: StageContext,
    pairs: list[Pair],
    controls: list[int],
    num_training_sequences: int,
) -> list[Path]:
    """Full-rank scores of all rows wanted, and grids of all pairs; a file a shard of rows."""
    whole = split(1, 1)
    [full_rank] = map_shards(context, full_rank_shard, whole, name="full-rank", items="query sets")
    tokens = TokenStore.open(context.artifact("tokenize"))
    rows = sorted({pair.row for pair in pairs} | set(controls))
    return map_shards(
        context,
        rescore_shard,
        shards_of(tokens.shard_rows(rows, context.params.runtime.shards)),
        name="rescore",
        full_rank=full_rank.name,
        pairs=[[pair.query, pair.row] for pair in pairs],
        num_training_sequences=num_training_sequences,
    )


def full_rank_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """All queries without truncation."""
    queries = [
        described_query(query)
        for query in store.read_json(context.artifact("query") / "queries.json")
    ]
    reference = PassReference.of(context)
    write_prepared(path, prepare_queries(context, reference, queries, None, [EKFAC]))


def rescore_shard(
    context: StageContext,
    shard: ShardRef,
    path: Path,
    full_rank: str,
    pairs: list[list[int]],
    num_training_sequences: int,
) -> None:
    """`<row>/scores` of all queries, and `<row>/<query>` the layer × token grid of a pair."""
    reference = PassReference.of(context)
    attributed = reference.attributed()
    names = [layer.name for layer in attributed.layers]
    prepared = read_prepared(
        context.work / full_rank, [EKFAC], names, reference.dtype, reference.device
    )
    queries_of: dict[int, list[int]] = {}
    for query, row in pairs:
        queries_of.setdefault(row, []).append(query)
    tensors: dict[str, Tensor] = {}
    lengths = TokenStore.open(reference.tokenize).lengths
    for batch, chosen in reference.batches_with_rows(shard.items, shard.tick):
        wanted = [(q, n) for n, row in enumerate(chosen) for q in queries_of.get(row, ())]
        result = rescore(
            attributed.model,
            attributed.layers,
            prepared,
            batch,
            wanted,
            num_training_sequences,
        )
        for n, row in enumerate(chosen):
            tensors[f"{row}/scores"] = result.scores[:, n]
        for (q, n), grid in result.grids.items():
            tensors[f"{chosen[n]}/{q}"] = grid[:, : lengths[chosen[n]]]
    store.write_tensors(path, tensors)


def full_rank_agreement(
    influences: Influences, full: dict[str, Tensor], controls: list[int]
) -> dict[str, object]:
    """Pearson of truncated and full-rank scores: over the controls, and over all rescored."""
    place = {int(row): at for at, row in enumerate(influences.rows)}

    def agreement(rows: list[int]) -> float | None:
        if len(rows) < 2:
            return None
        truncated = influences.of(EKFAC)[:, [place[row] for row in rows]]
        exact = torch.stack([full[f"{row}/scores"] for row in rows], dim=1)
        each = [pearson(x, y) for x, y in zip(truncated, exact, strict=True)]
        return sum(each) / len(each)

    rescored = sorted(int(key.split("/")[0]) for key in full if key.endswith("/scores"))
    return {
        "pearson_control": agreement(controls),
        "pearson_all": agreement(rescored),
        "num_control": len(controls),
        "num_all": len(rescored),
    }
