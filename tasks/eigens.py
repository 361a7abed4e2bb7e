"""Eigendecompositions on disk: eigenvalues and eigenvectors of one factor at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from influence.eigenbasis import Eigen, EigenBasis
from influence.layers import Layer
from tasks import store


def write_eigens(path: Path, eigens: Iterable[tuple[str, Eigen]], dtype: torch.dtype) -> None:
    """Eigenvalues in float64 and eigenvectors (columns) in `dtype`, by factor name."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, eigen in eigens:
            yield f"{name}/values", eigen.values
            yield f"{name}/vectors", eigen.vectors.to(dtype)

    store.write_tensors_in_turn(path, tensors())


def read_eigen(folder: Path, name: str) -> Eigen:
    """One factor's eigendecomposition."""
    path = folder / "eigen.safetensors"
    return Eigen(
        store.read_tensor(path, f"{name}/values"), store.read_tensor(path, f"{name}/vectors")
    )


def read_bases(folder: Path, layers: Sequence[Layer], dtype: torch.dtype) -> dict[str, EigenBasis]:
    """The eigenbasis of each layer, in the dtype of the pass and on the layer's device; a shared A
    is read once.

    An expert that no token of the fit reached has none, and is absent.
    """
    fitted = set(store.tensor_names(folder / "eigen.safetensors"))
    layers = [each for each in layers if not each.is_routed or f"S/{each.name}/vectors" in fitted]
    devices = {name: layer.device for layer in layers for name in factor_names([layer])}
    vectors = {
        name: read_eigen(folder, name).vectors.to(device, dtype) for name, device in devices.items()
    }
    return {
        layer.name: EigenBasis(vectors[f"A/{layer.input_group}"], vectors[f"S/{layer.name}"])
        for layer in layers
    }


def factor_names(layers: Sequence[Layer]) -> list[str]:
    """`A/<group>` and `S/<layer>`, each once, in the order of the layers."""
    groups = dict.fromkeys(f"A/{layer.input_group}" for layer in layers)
    return [*groups, *(f"S/{layer.name}" for layer in layers)]
