"""Low-rank query matrices (Grosse et al. 2023, §3.2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.products import product

SPARE = 16  # columns of the subspace beyond the rank
ITERATIONS = 3  # each squares how fast what is left out falls


@dataclass(frozen=True, slots=True)
class LowRank:
    """V ≈ left @ right, one matrix a query; full rank is the same type, r = min(d_out, d_in)."""

    left: Float[Tensor, "q d_out r"]
    right: Float[Tensor, "q r d_in"]

    @classmethod
    def of(cls, V: Float[Tensor, "q d_out d_in"], rank: int | None) -> "LowRank":
        """The best approximation of V with `rank`; exact for None or a rank V cannot exceed.

        Of large matrices the singular vectors are found by subspace iteration. Decompositions are
        in float32 at least: torch has none of narrower types.

        Raises:
            ValueError: if `rank` is below 1.
        """
        num_queries, d_out, d_in = V.shape
        if rank is None or rank >= min(d_out, d_in):
            eye = torch.eye(min(d_out, d_in), dtype=V.dtype, device=V.device)
            eye = eye.expand(num_queries, -1, -1)
            return cls(V, eye) if d_in <= d_out else cls(eye, V)
        if rank < 1:
            raise ValueError(f"rank is {rank}; give at least 1, or null for full rank")
        wide = V.to(torch.promote_types(V.dtype, torch.float32))
        U, s, Vh = _leading_triplets(wide, rank)
        return cls(U[..., :rank] * s[..., None, :rank], Vh[..., :rank, :]).to(V.dtype, V.device)

    def dense(self) -> Float[Tensor, "q d_out d_in"]:
        """left @ right."""
        return product(self.left, self.right)

    def mapped(
        self,
        outputs: Callable[[Tensor], Tensor],
        inputs: Callable[[Tensor], Tensor],
    ) -> "LowRank":
        """Both factors mapped, say out of an eigenbasis; the dense matrix is never formed."""
        return LowRank(outputs(self.left), inputs(self.right))

    def select(self, queries: Sequence[int]) -> "LowRank":
        """The matrices of some of the queries, in the order given."""
        return LowRank(self.left[list(queries)], self.right[list(queries)])

    def zeros(self, num_queries: int) -> "LowRank":
        """Room for so many queries of the same shape."""
        sides = (side.new_zeros(num_queries, *side.shape[1:]) for side in (self.left, self.right))
        return LowRank(*sides)

    @property
    def dense_bytes(self) -> int:
        """Of `dense()`."""
        q, d_out, _ = self.left.shape
        return q * d_out * self.right.shape[2] * self.left.element_size()

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def num_queries(self) -> int:
        return self.left.shape[0]

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "LowRank":
        """The same matrices in the dtype and on the device of a pass."""
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))


def _leading_triplets(V: Float[Tensor, "q o i"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least `rank` singular values, the largest first, with their vectors.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, Algorithm 4.4) where it is
    many times cheaper than the whole decomposition. The starting vectors do not depend on V.
    """
    columns = rank + SPARE
    if 4 * columns > min(V.shape[1:]):
        return torch.linalg.svd(V, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(V.shape[2], columns, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(product(V, start.to(V)))[0]
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(product(V.mT, Q))[0]
        Q = torch.linalg.qr(product(V, Q))[0]
    U, s, Vh = torch.linalg.svd(product(Q.mT, V), full_matrices=False)
    return product(Q, U), s, Vh
