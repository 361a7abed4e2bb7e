"""Kronecker factors A = E[a aᵀ] and S = E[Ds Dsᵀ] (Grosse et al. 2023, Eq. 16)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.examples import Batch
from influence.layers import Layer
from influence.passes import pseudo_gradients
from influence.sequences import TokenBatch

BLOCK = 512  # columns; narrower products are slower for each multiplication


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

    Sums are kept in float64, products are taken in the pass's dtype.
    """
    inputs: dict[str, Covariance] = {}
    outputs: dict[str, Covariance] = {}
    for batch in batches:
        done: set[str] = set()
        ios = pseudo_gradients(model, layers, batch, seed)
        for layer in layers:
            if layer.name not in ios:
                continue
            a, ds = _loss_carrying(ios[layer.name], batch)
            _add(outputs, layer.name, Covariance(second_moment(ds).double(), len(ds)))
            if layer.input_group not in done:
                done.add(layer.input_group)
                _add(inputs, layer.input_group, _input_covariance(a, layer.has_bias))
    if not outputs:
        raise ValueError("no batch to fit the Kronecker factors on; give at least one sequence")
    return Factors(inputs, outputs)


def _loss_carrying(io: LayerIO, batch: Batch) -> tuple[Float[Tensor, "s i"], Float[Tensor, "s o"]]:
    """Rows of `a` and `ds` at the positions that carry a loss; all those of an image do."""
    if isinstance(batch, TokenBatch):
        return io.a[batch.loss_positions], io.ds[batch.loss_positions]
    return io.a.flatten(0, 1), io.ds.flatten(0, 1)


def _input_covariance(a: Float[Tensor, "s i"], has_bias: bool) -> Covariance:
    product = second_moment(a).double()
    if has_bias:
        # The homogeneous coordinate by a sum, not by a column of ones beside every activation.
        total = a.sum(dim=0, dtype=torch.float64).unsqueeze(1)
        corner = product.new_full((1, 1), len(a))
        product = torch.cat(
            [torch.cat([product, total], dim=1), torch.cat([total.mT, corner], dim=1)]
        )
    return Covariance(product, len(a))


def second_moment(x: Float[Tensor, "s d"]) -> Float[Tensor, "d d"]:
    """xᵀx, of which only the blocks on and above the diagonal are multiplied out."""
    width = x.shape[1]
    if width < 2 * BLOCK:
        return x.mT @ x
    product = x.new_empty(width, width)
    for start in range(0, width, BLOCK):
        rows = slice(start, start + BLOCK)
        product[rows, start:] = x[:, rows].mT @ x[:, start:]
        product[start + BLOCK :, rows] = product[rows, start + BLOCK :].mT
    return product


def _add(into: dict[str, Covariance], name: str, covariance: Covariance) -> None:
    if name in into:
        into[name].sum.add_(covariance.sum)  # in place: one accumulator per factor
        covariance = Covariance(into[name].sum, into[name].num_tokens + covariance.num_tokens)
    into[name] = covariance


def _sum(left: Mapping[str, Covariance], right: Mapping[str, Covariance]) -> dict[str, Covariance]:
    # A layer that one side never ran (an idle expert) counts as zero there.
    return {
        name: left[name] + right[name]
        if name in left and name in right
        else (left[name] if name in left else right[name])
        for name in dict.fromkeys([*left, *right])
    }
