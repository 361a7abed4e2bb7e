"""Many queries in one subspace: they meet a candidate there, at a stated loss.

With U and W orthonormal, V_q ≈ U C_q Wᵀ. A candidate's tokens are projected once for all queries,
and a query costs as much as its core C_q is large. Nothing is lost where the queries' factors span
no more than U and W do; else what is lost is known, since projections only shorten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from influence.capture import LayerIO
from influence.lowrank import LowRank
from influence.products import product
from influence.sums import UpperMoment

SPARE = 16  # columns of the search beyond those that are kept
ITERATIONS = 4  # each squares how fast what is left out falls
GRAM = 2  # factors so many times as long as they are high are larger than their Gram matrix
PART = 2**24  # numbers of them that are in float64 at once


@dataclass(frozen=True, slots=True)
class SharedSubspace:
    """The queries of one layer.

    Attributes:
        outputs: U, orthonormal columns.
        inputs: W, orthonormal columns; its last row meets the 1 of a bias.
        cores: C_q.
        lost: ‖V_q − U C_q Wᵀ‖ / ‖V_q‖ in Frobenius norm, root mean square over the queries.
    """

    outputs: Float[Tensor, "o left"]
    inputs: Float[Tensor, "d_in right"]
    cores: Float[Tensor, "q left right"]
    lost: float

    @classmethod
    def of(cls, query: LowRank, columns: int) -> "SharedSubspace":
        """The subspace of `columns` on either side that holds nearly the most of all queries, each
        of which counts the same however large it is.

        Raises:
            ValueError: if `columns` is below 1.
        """
        if columns < 1:
            raise ValueError(f"a subspace of {columns} columns holds nothing; give 1 or more")
        # Products are in float32 at least, decompositions in float64.
        dtype = query.left.dtype
        wide = query.to(torch.promote_types(dtype, torch.float32), query.left.device)
        left, right = wide.left, wide.right.mT
        grams = (left.mT @ left).double(), (right.mT @ right).double()
        squares = (grams[0] * grams[1]).sum(dim=(1, 2))  # ‖V_q‖²
        weights = squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt()[:, None, None]
        # V Vᵀ = (left K)(left K)ᵀ with K Kᵀ = rightᵀ right: what a side weighs in the product.
        U = _range(left @ (weights * _root(grams[1])).to(left), columns)
        W = _range(right @ (weights * _root(grams[0])).to(right), columns)
        cores = (U.mT @ left) @ (right.mT @ W)
        kept = cores.double().square().sum(dim=(1, 2))
        lost = torch.where(squares > 0, 1 - kept / squares, 0).clamp(0, 1)
        return cls(U.to(dtype), W.to(dtype), cores.to(dtype), float(lost.mean().sqrt()))

    def __call__(self, io: LayerIO) -> Float[Tensor, "q n"]:
        """⟨U C_q Wᵀ, Σ_t ds [a; 1]ᵀ⟩."""
        bias = self.inputs[-1] if io.has_bias else None
        a = product(io.a, self.inputs[: io.a.shape[2]], bias)
        projected = product(product(io.ds, self.outputs).mT, a)
        return product(self.cores.flatten(1), projected.flatten(1).mT)

    def select(self, queries: Sequence[int]) -> LowRank:
        """What is left of some of the queries, in the order given."""
        return LowRank(
            self.outputs @ self.cores[list(queries)], self.inputs.mT.expand(len(queries), -1, -1)
        )

    @property
    def num_queries(self) -> int:
        return len(self.cores)


def _root(gram: Float64[Tensor, "q r r"]) -> Float64[Tensor, "q r r"]:
    """K with K Kᵀ = gram, which may be singular."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def _range(X: Float[Tensor, "q d r"], columns: int) -> Float[Tensor, "d kept"]:
    """Leading left singular vectors of all X_q side by side, by randomised subspace iteration
    (Halko, Martinsson and Tropp 2011), of their Gram matrix where that is the smaller one."""
    flat = X.transpose(0, 1).flatten(1)
    width, length = flat.shape
    if columns >= width:
        return torch.eye(width, dtype=X.dtype, device=X.device)
    gram = _gram(flat) if length >= GRAM * width else None
    flat = flat if gram is not None else flat.double()

    def squared(Q: Float64[Tensor, "d k"]) -> Float64[Tensor, "d k"]:
        return flat @ (flat.mT @ Q) if gram is None else gram @ Q

    generator = torch.Generator().manual_seed(0)
    searched = min(width, length, columns + SPARE)
    start = torch.randn(width, searched, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(squared(start.to(X.device)))[0]
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(squared(Q))[0]
    _, vectors = torch.linalg.eigh(Q.mT @ squared(Q))
    return (Q @ vectors[:, -columns:].flip(1)).to(X.dtype).contiguous()


def _gram(flat: Float[Tensor, "d l"]) -> Float64[Tensor, "d d"]:
    """flat flatᵀ, a part of the columns in float64 at a time."""
    gram = flat.new_empty(len(flat), len(flat), dtype=torch.float64)
    moment = UpperMoment(len(flat), gram)
    for part in flat.split(max(1, PART // len(flat)), dim=1):
        moment.add(part.double().mT)
    moment.close(gram)
    return gram
