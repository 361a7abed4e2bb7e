"""How a layer's inputs and output gradients meet all queries: forms of one number, and their cost.

⟨V_q, Σ_t ds_t [a_t; 1]ᵀ⟩ is had in either of two ways: the sum over tokens is formed and meets
every V_q, or each token meets the factors of V_q and no gradient is formed. Which is cheaper
follows from the shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from influence.capture import LayerIO
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.products import product
from influence.subspace import SharedSubspace

# Multiply-adds that a number written and read once costs: products run at some 60 · 10⁹ a second
# on a core whose memory gives 11 · 10⁹ bytes; a GPU is about as lopsided.
TRAFFIC = 64

# The queries of a layer: as they were prepared, or in a subspace that they share.
Prepared = LowRank | SharedSubspace

# Numbers of a block of dense matrices, and queries that share one. More numbers leave the cache;
# fewer queries go over the gradients more often: beside 32 of them, 128 took .5 to .8 of the time.
CACHED, CACHED_BY_GPU = 2**22, 2**26
QUERIES = 128


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
        columns = product(io.a, self.right, self.bias)
        columns *= product(io.ds, self.left)
        return rearrange(columns.unflatten(-1, (-1, self.rank)).sum(dim=-1), "n t q -> q n t")


def meet(
    dense: Float[Tensor, "q d_out d_in"], gradients: Float[Tensor, "n d_out d_in"]
) -> Float[Tensor, "q n"]:
    """⟨V_q, ∇_n⟩ of all pairs."""
    return product(dense.flatten(1), gradients.flatten(1).mT)


def meet_blockwise(query: LowRank, gradients: Sequence[Tensor]) -> Float[Tensor, "q n"]:
    """The same with the dense matrices made a block at a time, while the cache holds it."""
    left, right = query.left, query.right
    (num_queries, d_out, _), d_in = left.shape, right.shape[2]
    wanted = CACHED if left.device.type == "cpu" else CACHED_BY_GPU
    height = min(d_out, max(1, wanted // (QUERIES * d_in)))
    summed = torch.promote_types(left.dtype, torch.float32)
    found = left.new_zeros(num_queries, sum(len(each) for each in gradients), dtype=summed)
    for start in range(0, d_out, height):
        rows = slice(start, start + height)
        part = torch.cat([each[:, rows].flatten(1) for each in gradients])
        for first in range(0, num_queries, QUERIES):
            some = slice(first, first + QUERIES)
            dense = left[some, rows] @ right[some]
            found[some] += product(dense.flatten(1), part.mT)
    return found.to(left.dtype)


def forms_gradients(query: LowRank, num_positions: int, window: float) -> bool:
    """Whether forming Σ_t ds aᵀ costs less a sequence than going token by token.

    Args:
        query: all queries of a layer.
        num_positions: tokens of a sequence.
        window: how many sequences meet the queries' dense matrices before these are made anew.
    """
    num_queries, rank = query.num_queries, query.rank
    d_out, d_in = query.left.shape[1], query.right.shape[2]
    by_token = num_positions * num_queries * rank * (d_in + d_out + TRAFFIC)
    made = num_queries * (rank + TRAFFIC) / window
    formed = (num_positions + TRAFFIC + num_queries + made) * d_in * d_out
    return formed <= by_token


@dataclass(frozen=True, slots=True)
class Waiting:
    """Sequence gradients of a layer that have not met the queries yet."""

    gradients: Float[Tensor, "n d_out d_in"]


@dataclass
class Contractions:
    """All layers' queries, and the gradients that wait for them within a budget of memory.

    Dense matrices of many queries may outgrow memory. Then sequence gradients wait, up to the
    budget, and meet a part of the queries at a time, whose matrices are made for all that wait;
    where the budget holds no more than those of one batch, none waits.

    Args:
        prepared: the queries of each layer.
        memory: bytes for dense matrices or for waiting gradients.
    """

    prepared: Mapping[str, Prepared]
    memory: int
    window: float = field(init=False)
    """Sequences that may wait at once; without end where all dense matrices fit and stay."""
    _by_token: dict[str, ByToken] = field(default_factory=dict, init=False)
    _dense: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        exact = [query for query in self.prepared.values() if isinstance(query, LowRank)]
        one = sum(query.dense_bytes // query.num_queries for query in exact)
        fits = sum(query.dense_bytes for query in exact) <= self.memory
        self.window = float("inf") if fits else max(1.0, self.memory / one)

    def begin(self, layer: Layer, io: LayerIO) -> Float[Tensor, "q n"] | Waiting:
        """⟨V_q, Σ_t ds [a; 1]ᵀ⟩ where it can be had at once."""
        query = self.prepared[layer.name]
        if isinstance(query, SharedSubspace):
            return query(io)
        if (by_token := self.by_token(layer, io)) is not None:
            return by_token(io)
        if len(io.ds) < self.window < float("inf"):
            return Waiting(io.gradient())
        if self.window < float("inf"):
            return meet_blockwise(query, [io.gradient()])
        if layer.name not in self._dense:
            self._dense[layer.name] = query.dense()
        return meet(self._dense[layer.name], io.gradient())

    def by_token(self, layer: Layer, io: LayerIO) -> ByToken | None:
        """The layer's queries for going token by token; None where another form is cheaper."""
        query = self.prepared[layer.name]
        window = max(self.window, float(len(io.ds)))
        if isinstance(query, SharedSubspace) or forms_gradients(query, io.a.shape[1], window):
            return None
        if layer.name not in self._by_token:
            self._by_token[layer.name] = ByToken.of(query, layer.has_bias)
        return self._by_token[layer.name]

    def finish(self, name: str, waiting: Sequence[Waiting]) -> Float[Tensor, "q n"]:
        """What waited at a layer with all queries, some queries at a time."""
        query = self.prepared[name]
        assert isinstance(query, LowRank)  # nothing waits to meet a subspace
        return meet_blockwise(query, [each.gradients for each in waiting])
