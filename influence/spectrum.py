"""Corrected eigenvalues Λ = E[((Q_A ⊗ Q_S)ᵀ Dθ)²] (Grosse et al. 2023, Eq. 20)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.eigenbasis import EigenBasis
from influence.layers import Layer
from influence.passes import pseudo_gradients
from influence.sequences import TokenBatch


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
    batches: Iterable[TokenBatch],
    seed: int,
) -> dict[str, Spectrum]:
    """Λ of every layer from pseudo-gradients, each sequence counting once.

    Sums are kept in float64; `bases` are in the pass's dtype.
    """
    spectra: dict[str, Spectrum] = {}
    for batch in batches:
        ios = pseudo_gradients(model, layers, batch, seed)
        for layer in layers:
            if layer.name not in ios:
                continue
            io = ios[layer.name]
            rotated = bases[layer.name].rotate_gradient(io)
            new = Spectrum(
                rotated.square().sum(dim=0, dtype=torch.float64),
                io.gradient().square().sum(dtype=torch.float64),
                len(batch.ids),
            )
            spectra[layer.name] = spectra[layer.name] + new if layer.name in spectra else new
    if not spectra:
        raise ValueError("no batch to fit the spectrum on; give at least one sequence")
    return spectra
