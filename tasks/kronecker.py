"""Kronecker factors on disk: one sum a factor, read one at a time."""

from pathlib import Path

import torch
from torch import Tensor

from influence.factors import Covariance, Factors
from tasks import store


def write_factors(path: Path, factors: Factors) -> None:
    """Sums and counts of A (by input group) and S (by layer)."""
    tensors: dict[str, Tensor] = {}
    for side, covariances in (("A", factors.inputs), ("S", factors.outputs)):
        for name, covariance in covariances.items():
            tensors[f"{side}/{name}/sum"] = covariance.sum
            tensors[f"{side}/{name}/num_tokens"] = torch.tensor(covariance.num_tokens)
    store.write_tensors(path, tensors)


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
    return Covariance(store.read_tensor(path, f"{name}/sum"), num_tokens)


def covariance_names(path: Path) -> list[str]:
    """`A/<group>` and `S/<layer>` of every factor in a file, sorted."""
    ends = "/sum"
    return [name.removesuffix(ends) for name in store.tensor_names(path) if name.endswith(ends)]
