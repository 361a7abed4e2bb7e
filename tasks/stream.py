"""Stage `stream`: one forward and backward over the candidates, met with every query at once."""

from collections.abc import Iterator
from pathlib import Path

import torch

from influence.selfinfluence import SelfInfluence
from influence.sequences import TokenBatch
from influence.streaming import stream_all
from influence.subspace import SharedSubspace
from tasks import store
from tasks.attributed import PassReference
from tasks.prepared import damping_of, methods_of, read_prepared, run_solvers
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
            "methods": list(methods_of(context.params)),
            "queries": [query["name"] for query in queries],
            "layers": [layer.name for layer in reference.attributed().layers],
            "num_sequences": len(rows),
            "shards": [part.name for part in parts],
            "subspace": subspace_lost(context, reference),
        },
    )


def subspace_lost(context: StageContext, reference: PassReference) -> dict[str, float] | None:
    """What the shared subspace leaves out of the queries, by layer; None where all are exact."""
    columns = context.params.stream.subspace
    if columns is None:
        return None
    prepared, methods = (
        context.artifact("query") / "prepared.safetensors",
        methods_of(context.params),
    )
    lost = {}
    for layer in reference.attributed().layers:  # one at a time
        [query] = read_prepared(prepared, methods, [layer], reference.dtype).values()
        lost[layer.name] = SharedSubspace.of(query, columns).lost
    return lost


def stream_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Raw scores `methods queries sequences layers` of one shard, rows ascending; with them, if it
    is asked for, self-influence `sequences layers`."""
    reference = PassReference.of(context)
    prepared = context.artifact("query") / "prepared.safetensors"
    methods = methods_of(context.params)
    seen: list[int] = []

    def batches() -> Iterator[TokenBatch]:
        for batch, chosen in reference.batches_with_rows(shard.items, shard.tick):
            seen.extend(chosen)
            yield batch

    with reference.passes() as attributed:
        queries = read_prepared(prepared, methods, attributed.layers, reference.dtype)
        selves = None
        if context.params.stream.self_influence:
            solvers = run_solvers(context, reference, attributed.layers)
            selves = SelfInfluence(solvers, damping_of(context.params))
        layers = attributed.layers
        columns = context.params.stream.subspace
        told = list(
            stream_all(attributed.model, layers, queries, batches(), selves=selves, columns=columns)
        )
    rows, order = torch.tensor(seen).sort()
    # At least float32: a bf16 pass has summed its products in bf16 already, but no more is lost.
    raw = torch.cat([each.scores for each in told], dim=1).cpu()[:, order]
    kept = torch.promote_types(raw.dtype, torch.float32)
    tensors = {"rows": rows, "scores": raw.to(kept).unflatten(0, (len(methods), -1))}
    own = [each.self_influence for each in told if each.self_influence is not None]
    if own:
        tensors["self_influence"] = torch.cat(own).cpu()[order].to(kept)
    store.write_tensors(path, tensors)
