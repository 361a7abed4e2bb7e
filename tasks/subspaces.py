"""The subspace that all queries of a layer share, found once for all shards of stage `stream`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from influence.layers import Layer
from influence.subspace import SharedSubspace
from tasks import store
from tasks.attributed import PassReference
from tasks.prepared import methods_of, read_prepared
from tasks.shards import ShardRef, map_shards, split
from tasks.workspace import StageContext

PARTS = ("outputs", "inputs", "cores")


def share_queries(context: StageContext) -> list[Path]:
    """Files of all layers' subspaces."""
    layers = PassReference.of(context).attributed().layers
    shards = split(len(layers), context.params.runtime.shards)
    return map_shards(context, share_shard, shards, name="subspace", items="layers")


def share_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """The subspaces of some of the layers, one layer's queries in memory at a time."""
    reference, columns = PassReference.of(context), context.params.stream.subspace
    assert columns is not None
    layers, methods = reference.attributed().layers, methods_of(context.params)
    prepared = context.artifact("query") / "prepared.safetensors"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for item in shard.counted():
            name = layers[item].name
            query = read_prepared(prepared, methods, [layers[item]], reference.dtype)[name]
            shared = SharedSubspace.of(query, columns)
            yield from ((f"{name}/{part}", getattr(shared, part)) for part in PARTS)
            yield f"{name}/lost", torch.tensor(shared.lost, dtype=torch.float64)

    store.write_tensors_in_turn(path, tensors())


def read_subspaces(files: Sequence[Path], layers: Sequence[Layer]) -> dict[str, SharedSubspace]:
    """By layer and on its device."""
    where = {name: file for file in files for name in store.tensor_names(file)}

    def read(name: str) -> Tensor:
        return store.read_tensor(where[name], name)

    return {
        layer.name: SharedSubspace(
            *(read(f"{layer.name}/{part}").to(layer.device) for part in PARTS),
            lost=float(read(f"{layer.name}/lost")),
        )
        for layer in layers
    }


def lost_by_layer(files: Sequence[Path]) -> dict[str, float]:
    """What the subspaces leave out of the queries, ‖V − U C Wᵀ‖ / ‖V‖."""
    lost = {
        name: float(store.read_tensor(file, name))
        for file in files
        for name in store.tensor_names(file)
        if name.endswith("/lost")
    }
    return {name.removesuffix("/lost"): share for name, share in lost.items()}
