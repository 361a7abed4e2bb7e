"""Kronecker factors A = E[a aᵀ] and S = E[Ds Dsᵀ] (Grosse et al. 2023, Eq. 16)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.examples import Batch
from influence.layers import Layer
from influence.passes import pseudo_gradients
from influence.sequences import TokenBatch
from influence.sums import LongSum, add_upper_moment, gathered


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
    inputs: dict[str, _Moment] = {}
    outputs: dict[str, _Moment] = {}

    def add(ios: Mapping[str, LayerIO], batch: Batch) -> None:
        done: set[str] = set()
        rows = {device: _Rows.of(batch.to(device)) for device in {each.device for each in layers}}
        for layer in layers:
            if layer.name not in ios:
                continue
            io, of = ios[layer.name], rows[layer.device]
            ds = of(io.ds, io)
            if not len(ds):  # an expert that no token with a loss reached: no mean to speak of
                continue
            if layer.name not in outputs:
                outputs[layer.name] = _Moment(ds, has_bias=False)
            outputs[layer.name].add(ds)
            group = layer.input_group
            if group not in done:
                done.add(group)
                a = of(io.a, io)
                if group not in inputs:
                    inputs[group] = _Moment(a, layer.has_bias)
                inputs[group].add(a)

    num_batches = 0
    for batch in batches:  # no name keeps what a pass captured while the next one runs
        add(pseudo_gradients(model, layers, batch, seed), batch)
        num_batches += 1
    if not num_batches:
        raise ValueError("no batch to fit the Kronecker factors on; give at least one sequence")
    return Factors(_covariances(inputs), _covariances(outputs))


class _Moment:
    """Σ x xᵀ over rows, as it grows; of a bias, the homogeneous coordinate is a sum that joins at
    the end, not a column of ones beside every activation."""

    def __init__(self, like: Float[Tensor, "s d"], has_bias: bool) -> None:
        width = like.shape[1] + has_bias
        self._width, self._num_tokens = like.shape[1], 0
        self._products = LongSum(width, width, like)
        self._ones = like.new_zeros(like.shape[1], dtype=torch.float64) if has_bias else None

    def add(self, x: Float[Tensor, "s d"]) -> None:
        """Rows more."""
        x = x.to(self._products.dtype)
        add_upper_moment(self._products.open()[: self._width, : self._width], x)
        if self._ones is not None:
            # A product: a sum in float64 would first copy all of x into it.
            self._ones += x.new_ones(len(x)) @ x
        self._num_tokens += len(x)

    def covariance(self) -> Covariance:
        """The sum in float64."""
        total = self._products.total(mirrored=self._width)
        if self._ones is not None:
            total[-1, :-1] = total[:-1, -1] = self._ones
            total[-1, -1] = self._num_tokens
        return Covariance(total, self._num_tokens)


def _covariances(moments: dict[str, _Moment]) -> dict[str, Covariance]:
    """Of all; each sum is let go as soon as it is in float64, so that few are there twice."""
    return {name: moments.pop(name).covariance() for name in list(moments)}


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

    def __call__(self, x: Float[Tensor, "n t d"], io: LayerIO) -> Float[Tensor, "s d"]:
        """Rows of `a` or `ds`."""
        if isinstance(self.batch, TokenBatch) and io.positions is not None:
            carries = self.batch.loss_positions.gather(1, io.positions.clamp(min=0))
            return x[carries & (io.positions >= 0)]
        return x.flatten(0, 1) if self.places is None else gathered(x.flatten(0, 1), self.places)


def _sum(left: Mapping[str, Covariance], right: Mapping[str, Covariance]) -> dict[str, Covariance]:
    # A layer that one side never ran (an idle expert) counts as zero there.
    return {
        name: left[name] + right[name]
        if name in left and name in right
        else (left[name] if name in left else right[name])
        for name in dict.fromkeys([*left, *right])
    }
