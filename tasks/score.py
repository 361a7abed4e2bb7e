"""Stage `score`: rank the candidates, and score the top again at full rank, token by token."""

import torch
from torch import Tensor

from influence.scores import TopK
from influence.statistics import pearson
from tasks import store
from tasks.attributed import PassReference
from tasks.duplicates import duplicate_groups
from tasks.fullrank import Pair, rescore_all
from tasks.models import load_tokenizer
from tasks.prepared import EKFAC
from tasks.provenance import header
from tasks.ranking import Influences, ranks, read_influences
from tasks.sequences import TokenStore, choose_rows
from tasks.tables import write_duplicates, write_scores, write_self_influence, write_top
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Write scores, top, duplicates, summary and, if asked for, self-influence."""
    reference = PassReference.of(context)
    corpus = store.read_json(context.artifact("tokenize") / "summary.json")
    influences = read_influences(context.artifact("stream"), corpus["num_sequences"])
    score = context.params.score
    pairs = top_pairs(influences, score.top)
    controls = choose_rows(influences.rows.tolist(), score.control, score.seed)
    parts = rescore_all(context, pairs, controls)
    full = {key: value for part in parts for key, value in store.read_tensors(part).items()}
    write_scores(context, influences, ranks(influences.scores))
    if influences.self_influence is not None:
        write_self_influence(context, influences.rows, influences.self_influence)
    groups = find_duplicates(context, reference, influences.rows.tolist())
    write_duplicates(context, groups)
    write_top(context, reference, influences, pairs, full, groups)
    summary = {
        **header(context, reference),
        "subspace": store.read_json(context.artifact("stream") / "index.json")["subspace"],
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
