"""Stage `stream`: one forward and backward over the candidates, met with every query at once."""

from collections.abc import Iterator
from pathlib import Path

import torch

from influence.selfinfluence import SelfInfluence
from influence.sequences import TokenBatch
from influence.streaming import stream_all
from tasks import store
from tasks.attributed import PassReference
from tasks.layergroups import layer_memory, waiting_bytes
from tasks.prepared import damping_of, methods_of, read_prepared, run_solvers
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.subspaces import lost_by_layer, read_subspaces, share_queries
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Raw scores of every method, query, candidate and layer, a file a shard."""
    reference = PassReference.of(context)
    tokens = TokenStore.open(context.artifact("tokenize"))
    candidates = store.read_table(context.artifact("filter") / "candidates.parquet", ["row"])
    rows = sorted(candidates["row"].to_pylist())
    shards = shards_of(tokens.shard_rows(rows, context.params.runtime.shards))
    exact = context.params.stream.subspace is None
    subspaces = [] if exact else share_queries(context)
    shared = [path.name for path in subspaces]
    parts = map_shards(context, stream_shard, shards, subspaces=shared)
    queries = store.read_json(context.artifact("query") / "queries.json")
    for part in parts:
        store.link(part, context.out / part.name)
    store.write_json(
        context.out / "index.json",
        {
            "methods": list(methods_of(context.params)),
            "queries": [query["name"] for query in queries],
            "layers": [layer.name for layer in reference.attributed().layers],
            "num_sequences": len(rows),
            "shards": [part.name for part in parts],
            "subspace": None if exact else lost_by_layer(subspaces),
        },
    )


def stream_shard(
    context: StageContext, shard: ShardRef, path: Path, *, subspaces: list[str]
) -> None:
    """Raw scores `methods queries sequences layers` of one shard, rows ascending; with them, if it
    is asked for, self-influence `sequences layers`."""
    reference = PassReference.of(context)
    methods = methods_of(context.params)
    seen: list[int] = []

    def batches() -> Iterator[TokenBatch]:
        for batch, chosen in reference.batches_with_rows(shard.items, shard.tick):
            seen.extend(chosen)
            yield batch

    with reference.passes() as attributed:
        layers = attributed.layers
        if subspaces:
            queries = read_subspaces([context.work / name for name in subspaces], layers)
        else:
            prepared = context.artifact("query") / "prepared.safetensors"
            queries = read_prepared(prepared, methods, layers, reference.dtype)
        selves = None
        if context.params.stream.self_influence:
            solvers = run_solvers(context, reference, layers)
            selves = SelfInfluence(solvers, damping_of(context.params))
        memory = waiting_bytes(layer_memory(context.params.runtime, reference.device))
        told = list(stream_all(attributed.model, layers, queries, batches(), memory, selves))
    rows, order = torch.tensor(seen).sort()
    # At least float32: a bf16 pass has summed its products in bf16 already, but no more is lost.
    raw = torch.cat([each.scores for each in told], dim=1).cpu()[:, order]
    kept = torch.promote_types(raw.dtype, torch.float32)
    tensors = {"rows": rows, "scores": raw.to(kept).unflatten(0, (len(methods), -1))}
    own = [each.self_influence for each in told if each.self_influence is not None]
    if own:
        tensors["self_influence"] = torch.cat(own).cpu()[order].to(kept)
    store.write_tensors(path, tensors)
