"""What every inverse-Hessian estimator can do: solve (G + λI) X = V for one layer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from influence.damping import Damping


@runtime_checkable
class Solver(Protocol):
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
