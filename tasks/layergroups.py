"""Layers a group at a time: what does not fit into memory together is fitted in several passes.

A pass for a group of layers goes no further down than its lowest layer, so several cost less than
as many whole passes. The numbers do not depend on the groups: no layer looks at another.
"""

from collections.abc import Callable, Iterator, Sequence

from influence.layers import Layer, layer_groups
from influence.sequences import TokenBatch
from tasks.attributed import Attributed, PassReference
from tasks.budget import free_bytes
from tasks.params import Runtime
from tasks.shards import ShardRef
from tasks.workspace import StageContext

SUM = 12  # bytes of a number that is summed: float32 as it grows, float64 in the end
BASIS = 4  # bytes of a number of an eigenvector
SHARE = 0.25  # of the memory that is free; the passes themselves want some too


def factor_bytes(layers: Sequence[Layer]) -> int:
    """Of the sums A, one an input, and S."""
    inputs = {layer.input_group: layer.d_in for layer in layers}
    widths = [*inputs.values(), *(layer.d_out for layer in layers)]
    return SUM * sum(width**2 for width in widths)


def spectrum_bytes(layers: Sequence[Layer]) -> int:
    """Of the sums Λ and the eigenvectors that they are taken in."""
    numbers = sum(layer.d_in * layer.d_out for layer in layers)
    return SUM * numbers + BASIS * factor_bytes(layers) // SUM


def layer_memory(runtime: Runtime, device: str) -> int:
    """Bytes for what is kept of layers, by `runtime.layer_memory`: of one worker."""
    if runtime.layer_memory != "auto":
        return int(runtime.layer_memory * 2**30)
    return int(SHARE * free_bytes(device) / runtime.workers)


def passes_by_group(
    context: StageContext,
    reference: PassReference,
    attributed: Attributed,
    shard: ShardRef,
    size: Callable[[Sequence[Layer]], int],
) -> Iterator[tuple[tuple[Layer, ...], Iterator[TokenBatch]]]:
    """Each group of layers with the shard's batches, which are gone through once a group."""
    memory = layer_memory(context.params.runtime, reference.device)
    groups = layer_groups(attributed.layers, size, memory)
    passed = 0

    def tick(num_sequences: int) -> None:
        nonlocal passed
        shard.tick((passed + num_sequences) // len(groups) - passed // len(groups))
        passed += num_sequences

    for group in groups:
        yield group, reference.batches(shard.items, tick)
