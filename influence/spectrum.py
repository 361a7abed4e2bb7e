"""Corrected eigenvalues Λ = E[((Q_A ⊗ Q_S)ᵀ Dθ)²] (Grosse et al. 2023, Eq. 20)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.eigenbasis import EigenBasis, RotatedInputs
from influence.examples import Batch
from influence.layers import Layer
from influence.passes import check_finite, pseudo_gradients
from influence.sums import LongSum


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Σ_n ((Q_A ⊗ Q_S)ᵀ Dθ_n)² over sequences; Dθ_n is summed over tokens *before* it is squared.

    An orthogonal basis keeps norms. So that this is seen at run time, `norm_sum` and
    `rotated_norm_sum` are ‖ds aᵀ‖² before and after rotation, of one position of every fit that was
    added up here: of all sequences, the norms before would cost a tenth of the fit.
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
    def is_zero(self) -> bool:
        """Whether no gradient was added up, or none but zeros: an expert that was not reached."""
        return not bool(self.squared_sum.any())

    @property
    def trace_ratio(self) -> float:
        """‖ds aᵀ‖² after rotation over that before: 1, whatever the gradients are."""
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

    An expert without an eigenbasis, since no token reached it when the factors were fitted, has
    Λ = 0: see `Unreached`.

    Sums over batches are those of `LongSum`; `bases` are in the pass's dtype.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, if a gradient is not finite.
    """
    for layer in layers:
        if layer.name not in bases and not layer.is_routed:
            raise ValueError(f"layer {layer.name!r} has no eigenbasis; fit its factors first")
    squares = _Squares(bases, layers)
    num_sequences = 0
    for batch in batches:  # no name keeps what a pass captured while the next one runs
        squares.add(pseudo_gradients(model, layers, batch, seed), batch)
        # A sequence that does not run a layer has gradient 0 there, and counts in the mean.
        num_sequences += len(batch.ids)
    if not num_sequences:
        raise ValueError("no batch to fit the spectrum on; give at least one sequence")
    return {layer.name: squares.spectrum(layer, num_sequences) for layer in layers}


class _Squares:
    """Σ of squares of each layer, as it grows."""

    def __init__(self, bases: Mapping[str, EigenBasis], layers: Sequence[Layer]) -> None:
        self._bases = bases
        # Before the first pass, as in `fit_factors`.
        self._sums = {each.name: self._sum(each.name) for each in layers if not each.is_routed}
        self._norms: dict[str, Tensor] = {}  # before and after rotation

    def _sum(self, name: str) -> LongSum:
        basis = self._bases[name]
        return LongSum(basis.d_out, basis.d_in, basis.Q_A)

    def add(self, ios: Mapping[str, LayerIO], batch: Batch) -> None:
        """A batch more."""
        totals: dict[str, Tensor] = {}
        shared = RotatedInputs()
        for name, io in ios.items():
            if name not in self._bases:  # an expert that no token of the factors' fit reached
                continue
            basis = self._bases[name]
            if name not in self._sums:
                self._sums[name] = self._sum(name)
            if name not in self._norms and (norms := _norms(io, basis)) is not None:
                self._norms[name] = norms
            into = self._sums[name].open()
            basis.add_rotated_squares(into, io, shared)
            totals[name] = into.sum()
        # One look at all layers: each would make a GPU wait.
        found = [total.to(batch.ids.device) for total in totals.values()]
        if found and not torch.stack(found).isfinite().all():
            for name in totals:
                G = self._bases[name].rotate_gradient(ios[name])
                check_finite(G.square().sum(dim=(1, 2)), name, batch)

    def spectrum(self, layer: Layer, num_sequences: int) -> Spectrum:
        """Of one layer; a layer that never ran (an idle expert) has gradient 0."""
        if layer.name not in self._sums:
            zero = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)
            return Spectrum(zero, zero.new_zeros(()), zero.new_zeros(()), num_sequences)
        total = self._sums.pop(layer.name).total()  # let go: few are there twice
        before, after = self._norms.get(layer.name, total.new_zeros(2))
        return Spectrum(total, before, after, num_sequences)


def _norms(io: LayerIO, basis: EigenBasis) -> Float64[Tensor, " 2"] | None:
    """‖ds [a; 1]ᵀ‖² before and after rotation, of the largest output gradient of the first sequence
    that has one: none need have reached an expert."""
    reached = io.ds.flatten(1).any(dim=1).nonzero()
    if not len(reached):
        return None
    io = io.select(int(reached[0]))
    t = int(io.ds[0].square().sum(dim=-1).argmax())
    one = LayerIO(io.a[:, t : t + 1], io.ds[:, t : t + 1], io.has_bias)
    pair = [one.gradient(), basis.rotate_gradient(one)]
    return torch.stack([each.double().square().sum() for each in pair])
