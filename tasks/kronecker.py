"""Kronecker factors on disk: one sum a factor, read one at a time."""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from influence.factors import Covariance, Factors
from tasks import store


def write_factors(path: Path, factors: Factors, dtype: torch.dtype = torch.float64) -> None:
    """Sums and counts of A (by input group) and S (by layer); of a symmetric matrix, one half."""
    store.write_tensors_in_turn(path, factor_tensors(factors, dtype))


def factor_tensors(
    factors: Factors, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, Tensor]]:
    """What is written of factors."""
    for side, covariances in (("A", factors.inputs), ("S", factors.outputs)):
        for name, covariance in covariances.items():
            yield f"{side}/{name}/upper", packed(covariance.sum.to(dtype))
            yield f"{side}/{name}/num_tokens", torch.tensor(covariance.num_tokens)


def add_factors(parts: Sequence[Path], path: Path, dtype: torch.dtype) -> int:
    """Write the sum of files, one factor in memory at a time, added in their order in float64.

    Returns:
        The number of tokens of the layer that most went through.
    """
    most = 0
    holders: dict[str, list[Path]] = {}  # a layer that a part never ran (an idle expert) is absent
    for part in parts:
        for name in covariance_names(part):
            holders.setdefault(name, []).append(part)

    def sums() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, files in sorted(holders.items()):
            uppers = (store.read_tensor(file, f"{name}/upper") for file in files)
            yield f"{name}/upper", reduce(add, uppers).to(dtype)
            num_tokens = sum(int(store.read_tensor(file, f"{name}/num_tokens")) for file in files)
            yield f"{name}/num_tokens", torch.tensor(num_tokens)
            most = max(most, num_tokens)

    store.write_tensors_in_turn(path, sums())
    return most


def read_factors(path: Path) -> Factors:
    """The inverse of `write_factors`."""
    names = covariance_names(path)

    def side(prefix: str) -> dict[str, Covariance]:
        return {
            name.removeprefix(prefix): read_covariance(path, name)
            for name in names
            if name.startswith(prefix)
        }

    return Factors(side("A/"), side("S/"))


def read_covariance(path: Path, name: str) -> Covariance:
    """One factor, by its name `A/<group>` or `S/<layer>`."""
    num_tokens = int(store.read_tensor(path, f"{name}/num_tokens"))
    return Covariance(unpacked(store.read_tensor(path, f"{name}/upper")), num_tokens)


def covariance_names(path: Path) -> list[str]:
    """`A/<group>` and `S/<layer>` of every factor in a file, sorted."""
    ends = "/upper"
    return [name.removesuffix(ends) for name in store.tensor_names(path) if name.endswith(ends)]


def covariance_size(path: Path, name: str) -> int:
    """How many rows a factor has, without reading it."""
    return _size(store.tensor_shape(path, f"{name}/upper")[0])


def packed(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " half"]:
    """The diagonal of a symmetric matrix and what is above it, row after row."""
    return torch.cat([row[start:] for start, row in enumerate(matrix)])


def unpacked(upper: Float[Tensor, " half"]) -> Float[Tensor, "d d"]:
    """The inverse of `packed`."""
    size = _size(len(upper))
    matrix = upper.new_zeros(size, size)
    for start, row in enumerate(upper.split(list(range(size, 0, -1)))):
        matrix[start, start:] = row
    return matrix + matrix.triu(1).mT


def _size(num_packed: int) -> int:
    """d of d (d + 1) / 2."""
    return (math.isqrt(8 * num_packed + 1) - 1) // 2
