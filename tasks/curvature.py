"""Factors, eigenbases and spectra on disk, one tensor a factor, read a layer at a time."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from influence.eigenbasis import Eigen, EigenBasis
from influence.ekfac import EKFACBlock
from influence.factors import Covariance, Factors
from influence.layers import Layer
from influence.spectrum import Spectrum
from tasks import store


def write_factors(path: Path, factors: Factors) -> None:
    """Sums and counts of A (by input group) and S (by layer)."""
    tensors: dict[str, Tensor] = {}
    for side, covariances in (("A", factors.inputs), ("S", factors.outputs)):
        for name, covariance in covariances.items():
            tensors[f"{side}/{name}/sum"] = covariance.sum
            tensors[f"{side}/{name}/num_tokens"] = torch.tensor(covariance.num_tokens)
    store.write_tensors(path, tensors)


def read_covariance(path: Path, name: str) -> Covariance:
    """One factor, by its name `A/<group>` or `S/<layer>`."""
    num_tokens = int(store.read_tensor(path, f"{name}/num_tokens"))
    return Covariance(store.read_tensor(path, f"{name}/sum"), num_tokens)


def covariance_names(path: Path) -> list[str]:
    """`A/<group>` and `S/<layer>` of every factor in a file, sorted."""
    ends = "/sum"
    return [name.removesuffix(ends) for name in store.tensor_names(path) if name.endswith(ends)]


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


def factor_names(layers: Sequence[Layer]) -> list[str]:
    """`A/<group>` and `S/<layer>`, each once, in the order of the layers."""
    groups = dict.fromkeys(f"A/{layer.input_group}" for layer in layers)
    return [*groups, *(f"S/{layer.name}" for layer in layers)]


def write_eigens(path: Path, eigens: Mapping[str, Eigen]) -> None:
    """Eigenvalues and eigenvectors (columns) by factor name."""
    tensors: dict[str, Tensor] = {}
    for name, eigen in eigens.items():
        tensors[f"{name}/values"] = eigen.values
        tensors[f"{name}/vectors"] = eigen.vectors
    store.write_tensors(path, tensors)


def read_eigen(folder: Path, name: str) -> Eigen:
    """One factor's eigendecomposition."""
    path = folder / "eigen.safetensors"
    return Eigen(
        store.read_tensor(path, f"{name}/values"), store.read_tensor(path, f"{name}/vectors")
    )


def read_bases(
    folder: Path, layers: Sequence[Layer], dtype: torch.dtype, device: str
) -> dict[str, EigenBasis]:
    """The eigenbasis of each layer, in the dtype of the pass; a shared A is read once."""
    vectors = {
        name: read_eigen(folder, name).vectors.to(device, dtype) for name in factor_names(layers)
    }
    return {
        layer.name: EigenBasis(vectors[f"A/{layer.input_group}"], vectors[f"S/{layer.name}"])
        for layer in layers
    }


def write_spectra(path: Path, spectra: Mapping[str, Spectrum]) -> None:
    """Sums and counts of Λ by layer."""
    tensors: dict[str, Tensor] = {}
    for name, spectrum in spectra.items():
        tensors[f"{name}/squared_sum"] = spectrum.squared_sum
        tensors[f"{name}/norm_sum"] = spectrum.norm_sum
        tensors[f"{name}/num_sequences"] = torch.tensor(spectrum.num_sequences)
    store.write_tensors(path, tensors)


def read_spectra(path: Path) -> dict[str, Spectrum]:
    """The inverse of `write_spectra`."""
    tensors = store.read_tensors(path)
    return {
        name: Spectrum(
            tensors[f"{name}/squared_sum"],
            tensors[f"{name}/norm_sum"],
            int(tensors[f"{name}/num_sequences"]),
        )
        for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in tensors)
    }


def add_spectra(parts: Iterable[Mapping[str, Spectrum]]) -> dict[str, Spectrum]:
    """Sum of shards, in the order given."""
    total: dict[str, Spectrum] = {}
    for part in parts:
        for name, spectrum in part.items():
            total[name] = total[name] + spectrum if name in total else spectrum
    return total


def read_solvers(
    eigen: Path, correct: Path, layers: Sequence[Layer], dtype: torch.dtype, device: str
) -> dict[str, EKFACBlock]:
    """The EK-FAC solver of each layer, from the folders of `eigen` and `correct`."""
    bases = read_bases(eigen, layers, dtype, device)
    spectra = read_spectra(correct / "spectrum.safetensors")
    return {
        layer.name: EKFACBlock(bases[layer.name], spectra[layer.name].values.to(device, dtype))
        for layer in layers
    }
