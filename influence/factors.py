"""Kronecker factors A = E[a aᵀ] and S = E[Ds Dsᵀ] (Grosse et al. 2023, Eq. 16)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.examples import Batch
from influence.layers import Layer
from influence.passes import pseudo_gradients
from influence.sequences import TokenBatch
from influence.sums import UpperMoment, gathered


@dataclass(frozen=True, slots=True)
class Covariance:
    """Σ_t x xᵀ over supervised tokens, uncentred, and how many tokens went in."""

    sum: Float[Tensor, "d d"]
    num_tokens: int

    @property
    def value(self) -> Float[Tensor, "d d"]:
        """The mean over supervised tokens."""
        return self.sum / self.num_tokens

    def __add__(self, other: "Covariance") -> "Covariance":
        return Covariance(self.sum + other.sum, self.num_tokens + other.num_tokens)


@dataclass(frozen=True, slots=True)
class KroneckerFactors:
    """The two factors of one layer; A ⊗ S approximates its block of G *per token*."""

    A: Covariance
    S: Covariance


@dataclass(frozen=True, slots=True)
class Factors:
    """All factors: A by input group, so that layers with one input keep one A; S by layer."""

    inputs: Mapping[str, Covariance]
    outputs: Mapping[str, Covariance]

    def __add__(self, other: "Factors") -> "Factors":
        return Factors(_sum(self.inputs, other.inputs), _sum(self.outputs, other.outputs))

    def of(self, layer: Layer) -> KroneckerFactors:
        """The factors of one layer."""
        return KroneckerFactors(self.inputs[layer.input_group], self.outputs[layer.name])


def fit_factors(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch], seed: int
) -> Factors:
    """Factors from pseudo-gradients, each supervised token counting once (§3.1 of the paper).

    Those of an expert are means over the supervised tokens that are routed to it. One that none
    reaches has no factors.

    Products are taken in the pass's dtype, at least float32, and summed as in `LongSum`.
    """
    # Before the first pass: what stays would leave holes among what a pass lets go. Experts, of
    # which many are never reached, take theirs when they are.
    fixed = [layer for layer in layers if not layer.is_routed]
    inputs = {each.input_group: _Moment.of_inputs(each) for each in fixed}
    outputs = {each.name: _Moment.of_outputs(each) for each in fixed}

    def fit(batch: Batch) -> None:
        done: set[str] = set()
        rows = {device: _Rows.of(batch.to(device)) for device in {each.device for each in layers}}

        def add_inputs(layer: Layer, a: Float[Tensor, "n t i"]) -> None:
            if layer.input_group not in done:
                done.add(layer.input_group)
                inputs[layer.input_group].add(rows[layer.device](a))

        # A is summed on the way forward, so that no layer's input waits for the way back.
        ios = pseudo_gradients(model, layers, batch, seed, add_inputs)
        for layer in layers:
            if layer.name not in ios:
                continue
            io, of = ios[layer.name], rows[layer.device]
            ds = of(io.ds, io.positions)
            if not len(ds):  # an expert that no token with a loss reached: no mean to speak of
                continue
            if layer.name not in outputs:
                outputs[layer.name] = _Moment.of_outputs(layer)
            outputs[layer.name].add(ds)
            if layer.is_routed and layer.input_group not in done:
                done.add(layer.input_group)
                if layer.input_group not in inputs:
                    inputs[layer.input_group] = _Moment.of_inputs(layer)
                inputs[layer.input_group].add(of(io.a, io.positions))

    num_batches = 0
    for batch in batches:
        fit(batch)
        num_batches += 1
    if not num_batches:
        raise ValueError("no batch to fit the Kronecker factors on; give at least one sequence")
    return Factors(_covariances(inputs), _covariances(outputs))


class _Moment:
    """Σ x xᵀ over rows, as it grows; of a bias, the homogeneous coordinate is a sum that joins at
    the end, not a column of ones beside every activation."""

    def __init__(self, width: int, has_bias: bool, layer: Layer) -> None:
        like = next(layer.module.parameters())
        self._width, self._device, self.num_tokens = width, like.device, 0
        self._products = UpperMoment(width, like)
        self._ones = like.new_zeros(width, dtype=torch.float64) if has_bias else None

    @classmethod
    def of_inputs(cls, layer: Layer) -> "_Moment":
        return cls(layer.d_in - layer.has_bias, layer.has_bias, layer)

    @classmethod
    def of_outputs(cls, layer: Layer) -> "_Moment":
        return cls(layer.d_out, False, layer)

    def add(self, x: Float[Tensor, "s d"]) -> None:
        """Rows more."""
        x = x.to(self._products.dtype)
        self._products.add(x)
        if self._ones is not None:
            # A product: a sum in float64 would first copy all of x into it.
            self._ones += x.new_ones(len(x)) @ x
        self.num_tokens += len(x)

    def covariance(self) -> Covariance:
        """The sum in float64, as the last thing asked of it."""
        width = self._width + (self._ones is not None)
        total = torch.empty(width, width, dtype=torch.float64, device=self._device)
        self._products.close(total[: self._width, : self._width])
        if self._ones is not None:
            total[-1, :-1] = total[:-1, -1] = self._ones
            total[-1, -1] = self.num_tokens
        return Covariance(total, self.num_tokens)


def _covariances(moments: dict[str, _Moment]) -> dict[str, Covariance]:
    """Of all that a token reached; each sum is let go as soon as it is in float64, so that few are
    there twice."""
    reached = [name for name, moment in moments.items() if moment.num_tokens]
    return {name: moments.pop(name).covariance() for name in reached}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Picks what belongs to positions that carry a loss; all those of an image do.

    `places` are those among all positions of the batch, asked for once for all layers.
    """

    batch: Batch
    places: Int[Tensor, " s"] | None

    @classmethod
    def of(cls, batch: Batch) -> "_Rows":
        is_text = isinstance(batch, TokenBatch)
        return cls(batch, batch.loss_positions.flatten().nonzero()[:, 0] if is_text else None)

    def __call__(
        self, x: Float[Tensor, "n t d"], positions: Int[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "s d"]:
        """Rows of `a` or `ds`; of an expert, whose columns are at these positions."""
        if isinstance(self.batch, TokenBatch) and positions is not None:
            carries = self.batch.loss_positions.gather(1, positions.clamp(min=0))
            return x[carries & (positions >= 0)]
        return x.flatten(0, 1) if self.places is None else gathered(x.flatten(0, 1), self.places)


def _sum(left: Mapping[str, Covariance], right: Mapping[str, Covariance]) -> dict[str, Covariance]:
    # A layer that one side never ran (an idle expert) counts as zero there.
    return {
        name: left[name] + right[name]
        if name in left and name in right
        else (left[name] if name in left else right[name])
        for name in dict.fromkeys([*left, *right])
    }
