"""How a layer's inputs and output gradients meet all queries: forms of one number, and their cost.

⟨V_q, Σ_t ds_t [a_t; 1]ᵀ⟩ is had in either of two ways: the sum over tokens is formed and meets
every V_q, or each token meets the factors of V_q and no gradient is formed. Which is cheaper
follows from the shapes.
"""

from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from influence.capture import LayerIO
from influence.lowrank import LowRank

# Multiply-adds that a number written and read once costs: products run at some 60 · 10⁹ a second
# on a core whose memory gives 11 · 10⁹ bytes; a GPU is about as lopsided.
TRAFFIC = 64


@dataclass(frozen=True, slots=True)
class Formed:
    """Sequence gradients are formed, and meet every query in one product."""

    dense: Float[Tensor, "q weights"]

    @classmethod
    def of(cls, query: LowRank, has_bias: bool) -> "Formed":
        """The queries' matrices, multiplied out; a bias is their last column like any other."""
        return cls(query.dense().flatten(1))

    def __call__(self, io: LayerIO) -> Float[Tensor, "q n"]:
        """⟨V_q, Σ_t ds [a; 1]ᵀ⟩."""
        return self.dense @ io.gradient().flatten(1).mT

    @staticmethod
    def cost(num_positions: int, d_in: int, d_out: int, num_queries: int, rank: int) -> int:
        """Multiply-adds a sequence."""
        return (num_positions + num_queries + TRAFFIC) * d_in * d_out


@dataclass(frozen=True, slots=True)
class ByToken:
    """Tokens meet the factors of the queries, all queries and ranks in one product a side."""

    left: Float[Tensor, "o columns"]
    right: Float[Tensor, "i columns"]
    bias: Float[Tensor, " columns"] | None
    rank: int

    @classmethod
    def of(cls, query: LowRank, has_bias: bool) -> "ByToken":
        """The queries' factors side by side."""
        left = rearrange(query.left, "q o r -> o (q r)").contiguous()
        right = rearrange(query.right, "q r i -> i (q r)").contiguous()
        bias = right[-1] if has_bias else None
        return cls(left, right[:-1] if has_bias else right, bias, query.rank)

    def __call__(self, io: LayerIO) -> Float[Tensor, "q n"]:
        """⟨V_q, Σ_t ds [a; 1]ᵀ⟩."""
        return self.tokens(io).sum(dim=-1)

    def tokens(self, io: LayerIO) -> Float[Tensor, "q n t"]:
        """ds_tᵀ V_q [a_t; 1] of every position; raw, as in `scores`."""
        products = io.a @ self.right
        if self.bias is not None:
            products += self.bias
        products *= io.ds @ self.left
        return rearrange(products.unflatten(-1, (-1, self.rank)).sum(dim=-1), "n t q -> q n t")

    @staticmethod
    def cost(num_positions: int, d_in: int, d_out: int, num_queries: int, rank: int) -> int:
        """Multiply-adds a sequence."""
        return num_positions * num_queries * rank * (d_in + d_out + TRAFFIC)


Contraction = Formed | ByToken


def cheapest(query: LowRank, num_positions: int) -> type[Contraction]:
    """The form that costs less for sequences of so many positions."""
    shape = (
        num_positions, query.right.shape[-1], query.left.shape[1], query.num_queries, query.rank
    )  # fmt: skip
    return Formed if Formed.cost(*shape) <= ByToken.cost(*shape) else ByToken
