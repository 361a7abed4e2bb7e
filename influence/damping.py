"""Damping λ of one layer. The type says the rule; no fitted object holds a λ."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RelativeDamping:
    """λ = ratio · mean(Λ) of the layer (Grosse et al. 2023, §5, with ratio 0.1)."""

    ratio: float

    def __post_init__(self) -> None:
        _check("ratio", self.ratio)

    def of(self, values: Float[Tensor, "d_out d_in"]) -> float:
        """λ for a layer with corrected eigenvalues `values`."""
        damping = self.ratio * float(values.double().mean())
        if not (damping > 0 and math.isfinite(damping)):
            raise ValueError(
                f"relative damping is {damping} because the layer's mean eigenvalue is not a "
                "positive number: its gradients vanish or overflow; leave the layer out, or give "
                "{value: …}"
            )
        return damping


@dataclass(frozen=True, slots=True)
class AbsoluteDamping:
    """λ = value, the same for every layer."""

    value: float

    def __post_init__(self) -> None:
        _check("value", self.value)

    def of(self, values: Float[Tensor, "d_out d_in"]) -> float:
        """λ, whatever the eigenvalues."""
        return self.value


Damping = RelativeDamping | AbsoluteDamping


def _check(name: str, number: float) -> None:
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"damping {name} is {number}; it must be a finite number above 0")
