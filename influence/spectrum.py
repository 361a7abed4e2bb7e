"""Corrected eigenvalues Λ = E[((Q_A ⊗ Q_S)ᵀ Dθ)²] (Grosse et al. 2023, Eq. 20)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.eigenbasis import EigenBasis
from influence.examples import Batch
from influence.layers import Layer
from influence.passes import check_finite, pseudo_gradients


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Σ_n ((Q_A ⊗ Q_S)ᵀ Dθ_n)² over sequences; Dθ_n is summed over tokens *before* it is squared.

    `norm_sum` is Σ_n ‖Dθ_n‖² of the gradients before rotation. An orthogonal basis keeps it, so
    Σ Λ = mean ‖Dθ‖² is a check on the whole fit at run time.
    """

    squared_sum: Float[Tensor, "d_out d_in"]
    norm_sum: Float[Tensor, ""]
    num_sequences: int

    @property
    def values(self) -> Float[Tensor, "d_out d_in"]:
        """Λ, the mean over sequences."""
        return self.squared_sum / self.num_sequences

    @property
    def mean_squared_norm(self) -> Float[Tensor, ""]:
        """mean ‖Dθ‖², from the gradients before rotation."""
        return self.norm_sum / self.num_sequences

    def __add__(self, other: "Spectrum") -> "Spectrum":
        return Spectrum(
            self.squared_sum + other.squared_sum,
            self.norm_sum + other.norm_sum,
            self.num_sequences + other.num_sequences,
        )


def fit_spectra(
    model: nn.Module,
    layers: Sequence[Layer],
    bases: Mapping[str, EigenBasis],
    batches: Iterable[Batch],
    seed: int,
) -> dict[str, Spectrum]:
    """Λ of every layer from pseudo-gradients, each sequence counting once.

    Sums are kept in float64; `bases` are in the pass's dtype.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, if a gradient is not finite.
    """
    squared: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    num_sequences = 0
    for batch in batches:
        ios = pseudo_gradients(model, layers, batch, seed)
        # A sequence that does not run a layer has gradient 0 there, and counts in the mean.
        num_sequences += len(batch.ids)
        for name, io in ios.items():
            new = io.gradient().square().sum(dim=(1, 2), dtype=torch.float64)
            check_finite(new, name, batch)
            rotated = bases[name].rotate_gradient(io).square().sum(dim=0, dtype=torch.float64)
            squared[name] = squared[name].add_(rotated) if name in squared else rotated
            norms[name] = norms[name] + new.sum() if name in norms else new.sum()
    if not num_sequences:
        raise ValueError("no batch to fit the spectrum on; give at least one sequence")
    return {
        layer.name: Spectrum(
            squared.get(layer.name, torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)),
            norms.get(layer.name, torch.zeros((), dtype=torch.float64)),
            num_sequences,
        )
        for layer in layers
    }
