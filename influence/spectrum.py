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

    An orthogonal basis keeps norms. So that this is seen at run time, `norm_sum` and
    `rotated_norm_sum` are ‖Dθ‖² before and after rotation, of the first sequence of every fit that
    was added up here: of all of them, the norms before would cost a tenth of the fit.
    """

    squared_sum: Float[Tensor, "d_out d_in"]
    norm_sum: Float[Tensor, ""]
    rotated_norm_sum: Float[Tensor, ""]
    num_sequences: int

    @property
    def values(self) -> Float[Tensor, "d_out d_in"]:
        """Λ, the mean over sequences."""
        return self.squared_sum / self.num_sequences

    @property
    def trace_ratio(self) -> float:
        """‖Dθ‖² after rotation over that before: 1, whatever the gradients are."""
        return float(self.rotated_norm_sum / self.norm_sum)

    def __add__(self, other: "Spectrum") -> "Spectrum":
        return Spectrum(
            self.squared_sum + other.squared_sum,
            self.norm_sum + other.norm_sum,
            self.rotated_norm_sum + other.rotated_norm_sum,
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

    Sums over batches are kept in float64; `bases` are in the pass's dtype.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, if a gradient is not finite.
    """
    squared: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}  # before and after rotation
    num_sequences = 0
    for batch in batches:
        ios = pseudo_gradients(model, layers, batch, seed)
        # A sequence that does not run a layer has gradient 0 there, and counts in the mean.
        num_sequences += len(batch.ids)
        for name, io in ios.items():
            new = bases[name].rotated_squares(io)
            if not new.isfinite().all():
                check_finite(bases[name].rotate_gradient(io).sum(dim=(1, 2)), name, batch)
            if name in squared:
                squared[name].add_(new)
                continue
            squared[name] = new.double()
            first = io.select(0)
            pair = [first.gradient().square(), bases[name].rotated_squares(first)]
            norms[name] = torch.stack([each.sum(dtype=torch.float64) for each in pair])
    if not num_sequences:
        raise ValueError("no batch to fit the spectrum on; give at least one sequence")
    nothing = torch.zeros(2, dtype=torch.float64)
    before, after = (
        {layer.name: norms.get(layer.name, nothing)[at] for layer in layers} for at in (0, 1)
    )
    return {
        layer.name: Spectrum(
            squared.get(layer.name, torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)),
            before[layer.name],
            after[layer.name],
            num_sequences,
        )
        for layer in layers
    }
