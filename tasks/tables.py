"""Tables for programs: candidates with scores, self-influence and duplicates; the top by token."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from influence.tokens import sparsity
from tasks import store
from tasks.attributed import PassReference
from tasks.models import load_tokenizer
from tasks.pieces import decode_pieces
from tasks.prepared import EKFAC
from tasks.ranking import Influences, ranks
from tasks.sequences import TokenStore
from tasks.workspace import StageContext

SCORES = {
    "method": "string",
    "query": "string",
    "row": "int64",
    "key": "int64",
    "sequence": "string",
    "influence": "float64",
    "rank": "int64",
}
SELF_INFLUENCE = {
    "row": "int64",
    "key": "int64",
    "sequence": "string",
    "self_influence": "float64",
    "rank": "int64",
}
DUPLICATES = {
    "row": "int64",
    "key": "int64",
    "sequence": "string",
    "group": "int64",
}
TOP = {
    "query": "string",
    "sign": "string",
    "rank": "int64",
    "row": "int64",
    "key": "int64",
    "sequence": "string",
    "group": "int64",
    "documents": "list<string>",
    "metadata": "string",
    "influence": "float64",
    "influence_low_rank": "float64",
    "layers": "list<float>",
    "tokens": "list<string>",
    "token_influence": "list<float>",
    "layer_token_influence": "list<list<float>>",
    "sparsity": "float64",
}


def write_scores(
    context: StageContext, influences: Influences, places: Int[Tensor, "m q n"]
) -> None:
    """One row a method, query and candidate, in that order."""
    sequences = store.read_table(context.artifact("tokenize") / "sequences.parquet")
    keys, names = sequences["key"].to_pylist(), sequences["sequence"].to_pylist()
    rows = influences.rows.tolist()
    blocks = [(method, query) for method in influences.methods for query in influences.queries]
    store.write_table(
        context.out / "scores.parquet",
        {
            "method": [method for method, _ in blocks for _ in rows],
            "query": [query for _, query in blocks for _ in rows],
            "row": rows * len(blocks),
            "key": [keys[row] for row in rows] * len(blocks),
            "sequence": [names[row] for row in rows] * len(blocks),
            "influence": influences.scores.flatten(),
            "rank": places.flatten(),
        },
        SCORES,
    )


def write_self_influence(
    context: StageContext, rows: Int[Tensor, " n"], own: Float[Tensor, " n"]
) -> None:
    """One row a candidate: nats of its own log-probability per extra copy of it."""
    folder = context.artifact("tokenize") / "sequences.parquet"
    sequences = store.read_table(folder, ["key", "sequence"])
    keys, names = sequences["key"].to_pylist(), sequences["sequence"].to_pylist()
    store.write_table(
        context.out / "self_influence.parquet",
        {
            "row": rows,
            "key": [keys[row] for row in rows.tolist()],
            "sequence": [names[row] for row in rows.tolist()],
            "self_influence": own,
            "rank": ranks(own.unsqueeze(0))[0],
        },
        SELF_INFLUENCE,
    )


def write_duplicates(context: StageContext, groups: Mapping[int, int]) -> None:
    """The candidates that have duplicates: one row each, by the first row of their group."""
    sizes = Counter(groups.values())
    rows = sorted((row for row in groups if sizes[groups[row]] > 1), key=lambda r: (groups[r], r))
    folder = context.artifact("tokenize") / "sequences.parquet"
    sequences = store.read_table(folder, ["key", "sequence"])
    columns = {
        "row": rows,
        "key": [sequences["key"][row].as_py() for row in rows],
        "sequence": [sequences["sequence"][row].as_py() for row in rows],
        "group": [groups[row] for row in rows],
    }
    store.write_table(context.out / "duplicates.parquet", columns, DUPLICATES)


def write_top(
    context: StageContext,
    reference: PassReference,
    influences: Influences,
    pairs: list,
    full: dict[str, Tensor],
    groups: Mapping[int, int],
) -> None:
    """The top of each query and sign, ordered by the full-rank score."""
    folder = context.artifact("tokenize")
    sequences = store.read_table(folder / "sequences.parquet").to_pylist()
    documents = store.read_table(folder / "documents.parquet").to_pylist()
    metadata = {document["document"]: document["metadata"] for document in documents}
    tokens = TokenStore.open(folder)
    tokenizer = load_tokenizer(reference.model.folder)
    place = {int(row): at for at, row in enumerate(influences.rows)}
    records: list[dict[str, object]] = []
    for q, name in enumerate(influences.queries):
        rows = [pair.row for pair in pairs if pair.query == q]
        totals = {row: float(full[f"{row}/{q}"].double().sum()) for row in rows}
        for sign, flip in (("+", -1), ("-", 1)):
            signed = [row for row in rows if flip * totals[row] < 0]
            signed.sort(key=lambda row: (flip * totals[row], row))
            for rank, row in enumerate(signed[: context.params.score.top], start=1):
                grid = full[f"{row}/{q}"].float()
                sequence = sequences[row]
                ids, goes_on = tokens.row_tokens(row).tolist(), _goes_on(sequence)
                records.append(
                    {
                        "query": name,
                        "sign": sign,
                        "rank": rank,
                        "row": row,
                        "key": sequence["key"],
                        "sequence": sequence["sequence"],
                        "group": groups[row],
                        "documents": sequence["documents"],
                        "metadata": _metadata(metadata, sequence["documents"]),
                        "influence": totals[row],
                        "influence_low_rank": float(influences.of(EKFAC)[q, place[row]]),
                        "layers": grid.sum(dim=1).tolist(),
                        "tokens": decode_pieces(tokenizer, ids, goes_on),
                        "token_influence": grid.sum(dim=0).tolist(),
                        "layer_token_influence": grid.tolist(),
                        "sparsity": sparsity(grid.sum(dim=0)),
                    }
                )
    columns = {column: [record[column] for record in records] for column in TOP}
    store.write_table(context.out / "top.parquet", columns, TOP)


def _goes_on(sequence: Mapping[str, Any]) -> bool:
    """Whether it begins in the middle of a document."""
    return sequence["sequence"] != sequence["documents"][0]


def _metadata(metadata: dict[str, str], documents: list[str]) -> str:
    """JSON of the document's other fields; of several documents, by their ids."""
    if len(documents) == 1:
        return metadata[documents[0]]
    return json.dumps({name: json.loads(metadata[name]) for name in documents}, ensure_ascii=False)
