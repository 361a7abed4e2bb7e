"""What every inverse-Hessian estimator can do: solve (G + λI) X = V."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from influence.damping import AbsoluteDamping, Damping

Blocks = Mapping[str, Float[Tensor, "q d_out d_in"]]


@runtime_checkable
class LayerSolver(Protocol):
    """One layer's (G + λI)⁻¹, by whichever approximation of G."""

    def solve(
        self, V: Float[Tensor, "*batch d_out d_in"], damping: Damping
    ) -> Float[Tensor, "*batch d_out d_in"]:
        """(G + λI)⁻¹V, of V's shape."""
        ...


@dataclass(frozen=True, slots=True)
class GradientDot:
    """The baseline that replaces G + λI by I: influence becomes a dot product of gradients."""

    def solve(
        self, V: Float[Tensor, "*batch d_out d_in"], damping: Damping
    ) -> Float[Tensor, "*batch d_out d_in"]:
        """V itself."""
        return V


@dataclass(frozen=True, slots=True)
class Unreached:
    """Of an expert of which the fit saw no gradient, so that Λ = 0 and no relative damping exists.

    Nothing being known of its curvature, it is left out: its part of every score is 0.
    """

    eigenvalues: Float[Tensor, "d_out d_in"]

    def solve(
        self, V: Float[Tensor, "*batch d_out d_in"], damping: Damping
    ) -> Float[Tensor, "*batch d_out d_in"]:
        """Zero."""
        return torch.zeros_like(V)


@runtime_checkable
class Solver(Protocol):
    """All layers' (G + diag λ_ℓ)⁻¹ at once, so that G may couple layers."""

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """(G + diag λ_ℓ)⁻¹V for every vector, by layer; `dampings` holds λ_ℓ by layer."""
        ...


@dataclass(frozen=True, slots=True)
class Blockwise:
    """A `Solver` of one `LayerSolver` a layer: G without the blocks between layers."""

    layers: Mapping[str, LayerSolver]

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """Each layer for itself."""
        return {
            name: self.layers[name].solve(block, AbsoluteDamping(dampings[name]))
            for name, block in V.items()
        }
