"""Scores: one pass over candidates, contracted with every query at once (Eq. 25 and 30).

This file owns the sign and the scale. A raw contraction is ⟨(G + λI)⁻¹∇f, ∇L(z)⟩; influence is
−1/N of it: nats of f per extra copy of z in training, positive when z raises f.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.examples import Batch
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import training_loss
from influence.passes import check_finite, run_pass


def influence(raw: Float[Tensor, "*shape"], num_training_sequences: int) -> Float[Tensor, "*shape"]:
    """−raw / N: nats of f per extra copy of the sequence, + raises f (Eq. 5 and 6, ε = 1/N)."""
    if num_training_sequences < 1:
        raise ValueError(f"N is {num_training_sequences}; a training set has at least 1 sequence")
    return -raw / num_training_sequences


def contract(
    io: LayerIO, query: LowRank, dense: Float[Tensor, "q d_out d_in"] | None = None
) -> Float[Tensor, "q n"]:
    """⟨V_q, Σ_t ds [a; 1]ᵀ⟩ for every query and sequence.

    With `dense` the sequence gradients are formed and meet all queries in one product; without
    it, tokens are contracted with the low-rank factors and no gradient is formed.
    """
    if dense is None:
        return token_contract(io, query).sum(dim=-1)
    return dense.flatten(1) @ io.gradient().flatten(1).mT


def token_contract(io: LayerIO, query: LowRank) -> Float[Tensor, "q n t"]:
    """ds_tᵀ V_q [a_t; 1] for every query, sequence and position; raw, as in `scores`."""
    by_output = einsum(io.ds, query.left, "n t o, q o r -> q n t r")
    right = query.right[..., : io.a.shape[-1]]
    by_input = einsum(io.a, right, "n t i, q r i -> q n t r")
    if io.has_bias:
        by_input = by_input + rearrange(query.right[..., -1], "q r -> q 1 1 r")
    return (by_output * by_input).sum(dim=-1)


def forms_gradients(layer: Layer, query: LowRank, num_positions: int) -> bool:
    """Whether forming Σ_t ds aᵀ costs fewer products than going token by token."""
    formed = (num_positions + query.num_queries) * layer.d_in * layer.d_out
    by_token = num_positions * query.num_queries * query.rank * (layer.d_in + layer.d_out)
    return formed <= by_token


def stream(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, LowRank],
    batches: Iterable[Batch],
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n l"]]]:
    """Raw scores of each batch, per layer in the order of `layers`; their sum is the sequence's.

    Yields:
        The batch's ids, and ⟨V_q, ∇L(z_n)⟩ of each layer, in the dtype of the pass.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, instead of a score that is not finite.
    """
    dense: dict[str, Tensor] = {}
    for batch in batches:
        ios = run_pass(model, layers, batch, training_loss)
        columns = []
        for layer in layers:
            query = prepared[layer.name]
            if layer.name not in ios:  # an idle expert: no gradient, no influence
                columns.append(query.left.new_zeros(query.num_queries, len(batch.ids)))
                continue
            if forms_gradients(layer, query, ios[layer.name].a.shape[1]):
                if layer.name not in dense:
                    dense[layer.name] = query.dense()
                columns.append(contract(ios[layer.name], query, dense[layer.name]))
            else:
                columns.append(contract(ios[layer.name], query))
        raw = torch.stack(columns, dim=-1)
        if not raw.isfinite().all():
            for layer, column in zip(layers, columns, strict=True):
                check_finite(column.sum(dim=0), layer.name, batch)
        yield batch.ids, raw


@dataclass(frozen=True, slots=True)
class TopK:
    """The k highest scores of each query, best first; equal scores by smaller id.

    `found` is k, or fewer while fewer scores were seen.
    """

    ids: Int[Tensor, "q found"]
    scores: Float[Tensor, "q found"]
    k: int

    @classmethod
    def of(cls, ids: Int[Tensor, " n"], scores: Float[Tensor, "q n"], k: int) -> "TopK":
        """The top of one set of scores; fewer than k when there are fewer."""
        return cls._best(ids.expand(len(scores), -1), scores, k)

    def merge(self, other: "TopK") -> "TopK":
        """The top of both; any order of merging gives the same answer.

        Raises:
            ValueError: if they are the top of different k.
        """
        if self.k != other.k:
            raise ValueError(f"a top {self.k} and a top {other.k} do not merge; take one k")
        ids = torch.cat([self.ids, other.ids], dim=1)
        return self._best(ids, torch.cat([self.scores, other.scores], dim=1), self.k)

    @classmethod
    def _best(cls, ids: Int[Tensor, "q n"], scores: Float[Tensor, "q n"], k: int) -> "TopK":
        by_id = ids.argsort(dim=1, stable=True)
        ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return cls(ids.gather(1, best), scores.gather(1, best), k)
