"""Layers a group at a time: what does not fit into memory together is fitted in several passes.

A pass for a group of layers goes no further down than its lowest layer, so several cost less than
as many whole passes. The numbers do not depend on the groups: no layer looks at another.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from influence.layers import Layer, layer_groups
from influence.sums import num_upper
from tasks.attributed import PassReference
from tasks.budget import free_bytes
from tasks.params import Runtime
from tasks.precision import devices_of
from tasks.shards import ShardRef
from tasks.workspace import StageContext

SUM = 12  # bytes of a number that is summed: float32 as it grows, float64 what has gathered
WHOLE = 8  # and in the end
BASIS = 4  # bytes of a number of an eigenvector, as passes read it
EIGEN = 8  # and as it is found
SHARE = 0.25  # of the memory that is free; the passes themselves want some too


def factor_bytes(layers: Sequence[Layer]) -> int:
    """Of the sums A, one an input, and S: half of each as it grows, the whole in the end."""
    return sum(max(SUM * num_upper(width), WHOLE * width**2) for width in _widths(layers))


def spectrum_bytes(layers: Sequence[Layer]) -> int:
    """Of the sums Λ and the eigenvectors that they are taken in."""
    return SUM * _num_weights(layers) + BASIS * _num_squares(layers)


def solved_bytes(layers: Sequence[Layer], num_queries: int, itemsize: int) -> int:
    """Of queries at full rank: dense, and while they are solved as two factors."""
    numbers = _num_weights(layers)
    return num_queries * itemsize * (numbers + _low_rank_numbers(layers, None))


def half_bytes(layers: Sequence[Layer], num_queries: int, rank: int | None, itemsize: int) -> int:
    """Of a fit from the sums to the queries, all of which `validate` holds of half of the data."""
    eigenvectors = EIGEN * _num_squares(layers)
    prepared = num_queries * itemsize * _low_rank_numbers(layers, rank)
    return factor_bytes(layers) + eigenvectors + spectrum_bytes(layers) + 2 * prepared


def _widths(layers: Sequence[Layer]) -> list[int]:
    inputs = {layer.input_group: layer.d_in for layer in layers}
    return [*inputs.values(), *(layer.d_out for layer in layers)]


def _num_squares(layers: Sequence[Layer]) -> int:
    return sum(width**2 for width in _widths(layers))


def _num_weights(layers: Sequence[Layer]) -> int:
    return sum(layer.d_in * layer.d_out for layer in layers)


def _low_rank_numbers(layers: Sequence[Layer], rank: int | None) -> int:
    full = [(layer.d_in + layer.d_out, min(layer.d_in, layer.d_out)) for layer in layers]
    return sum(widths * (most if rank is None else min(rank, most)) for widths, most in full)


def layer_memory(runtime: Runtime, device: str) -> int:
    """Bytes of each device for what is kept of layers, by `runtime.layer_memory`: of one worker."""
    if runtime.layer_memory != "auto":
        of_worker = runtime.layer_memory * 2**30
    else:
        of_worker = SHARE * free_bytes(device) / runtime.workers
    return int(of_worker / len(devices_of(device)))


def waiting_bytes(memory: int) -> int:
    """Of `memory`, what gradients may take that wait to meet many queries, or these queries dense.

    Rounded down to a power of two: how many wait decides how their products round, and what is
    free differs a little each time.
    """
    return 1 << (max(1, memory).bit_length() - 1)


def on_fullest(size: Callable[[Sequence[Layer]], int], layers: Sequence[Layer]) -> int:
    """What layers want together of the device that they want most of."""
    by_device: dict[object, list[Layer]] = {}
    for layer in layers:
        by_device.setdefault(layer.device, []).append(layer)
    return max(size(those) for those in by_device.values())


def groups_of_layers(
    context: StageContext,
    reference: PassReference,
    layers: Sequence[Layer],
    size: Callable[[Sequence[Layer]], int],
) -> list[tuple[Layer, ...]]:
    """As many layers at a time as one worker's memory holds, by what `size` says they want."""
    memory = layer_memory(context.params.runtime, reference.device)
    return layer_groups(layers, partial(on_fullest, size), memory)


def passes_by_group(
    context: StageContext,
    reference: PassReference,
    layers: Sequence[Layer],
    shard: ShardRef,
    size: Callable[[Sequence[Layer]], int],
) -> Iterator[tuple[tuple[Layer, ...], Callable[[int], None]]]:
    """Each group of layers, with the `tick` for a pass of its own over the shard's sequences."""
    groups = groups_of_layers(context, reference, layers, size)
    passed = 0

    def tick(num_sequences: int) -> None:
        nonlocal passed
        shard.tick((passed + num_sequences) // len(groups) - passed // len(groups))
        passed += num_sequences

    for group in groups:
        yield group, tick
