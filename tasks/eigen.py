"""Stage `eigen`: eigendecompositions of A and S in float64, mapped over groups of factors."""

from pathlib import Path

from influence.eigenbasis import eigendecompose
from tasks import store
from tasks.eigens import write_eigens
from tasks.kronecker import covariance_names, covariance_size, read_covariance
from tasks.precision import dtype_at_rest
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Decompose every factor; one file, eigenvectors in columns."""
    factors = context.artifact("factors") / "factors.safetensors"
    shards = shards_of(spread(factors, context.params.runtime.shards))
    parts = map_shards(context, decompose_shard, shards, items="factors")
    merged = (
        (name, store.read_tensor(part, name)) for part in parts for name in store.tensor_names(part)
    )
    store.write_tensors_in_turn(context.out / "eigen.safetensors", merged)


def decompose_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Decompose some of the factors, one in memory at a time."""
    factors = context.artifact("factors") / "factors.safetensors"
    names = covariance_names(factors)
    chosen = (names[item] for item in shard.counted())
    eigens = ((name, eigendecompose(read_covariance(factors, name).value, name)) for name in chosen)
    write_eigens(path, eigens, dtype_at_rest(context.params))


def spread(factors: Path, num_shards: int) -> list[list[int]]:
    """Groups of factors of about equal cost, which grows with the cube of a factor's size."""
    names = covariance_names(factors)
    cost = [covariance_size(factors, name) ** 3 for name in names]
    groups: list[list[int]] = [[] for _ in range(min(num_shards, len(names)))]
    load = [0] * len(groups)
    for item in sorted(range(len(names)), key=lambda item: (-cost[item], item)):
        lightest = load.index(min(load))
        groups[lightest].append(item)
        load[lightest] += cost[item]
    return groups
