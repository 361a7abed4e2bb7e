"""Stage `stream`: one forward and backward over the candidates, met with every query at once."""

from collections.abc import Iterator
from pathlib import Path

import torch

from influence.scores import stream
from influence.sequences import TokenBatch
from tasks import store
from tasks.attributed import PassReference
from tasks.prepared import METHODS, read_prepared
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Raw scores of every method, query, candidate and layer, a file a shard."""
    reference = PassReference.of(context)
    tokens = TokenStore.open(context.artifact("tokenize"))
    candidates = store.read_table(context.artifact("filter") / "candidates.parquet", ["row"])
    rows = sorted(candidates["row"].to_pylist())
    shards = shards_of(tokens.shard_rows(rows, context.params.runtime.shards))
    parts = map_shards(context, stream_shard, shards)
    queries = store.read_json(context.artifact("query") / "queries.json")
    for part in parts:
        store.link(part, context.out / part.name)
    store.write_json(
        context.out / "index.json",
        {
            "methods": list(METHODS),
            "queries": [query["name"] for query in queries],
            "layers": [layer.name for layer in reference.attributed().layers],
            "num_sequences": len(rows),
            "shards": [part.name for part in parts],
        },
    )


def stream_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Raw scores `methods queries sequences layers` of one shard, rows ascending."""
    reference = PassReference.of(context)
    prepared = context.artifact("query") / "prepared.safetensors"
    seen: list[int] = []

    def batches() -> Iterator[TokenBatch]:
        for batch, chosen in reference.batches_with_rows(shard.items, shard.tick):
            seen.extend(chosen)
            yield batch

    with reference.passes() as attributed:
        names = [layer.name for layer in attributed.layers]
        queries = read_prepared(prepared, METHODS, names, reference.dtype, reference.device)
        raw = [part for _, part in stream(attributed.model, attributed.layers, queries, batches())]
    rows, order = torch.tensor(seen).sort()
    # At least float32: a bf16 pass has summed its products in bf16 already, but no more is lost.
    scores = torch.cat(raw, dim=1).cpu()[:, order]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    store.write_tensors(path, {"rows": rows, "scores": scores.unflatten(0, (len(METHODS), -1))})
