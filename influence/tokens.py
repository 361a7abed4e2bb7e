"""Token attribution: how much of a score enters at which position (Grosse et al. 2023, Eq. 31).

A cell (ℓ, t) belongs to the position where the update happens, the token *before* the predicted
one. It is not the effect of erasing the token: ds_t mixes all later losses (§3.3 of the paper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.contraction import ByToken, meet
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import training_loss
from influence.passes import run_pass
from influence.scores import influence
from influence.sequences import TokenBatch


@dataclass(frozen=True, slots=True)
class Rescored:
    """Scores of a batch by all queries, and token grids for the pairs that were asked for."""

    scores: Float[Tensor, "q n"]
    grids: Mapping[tuple[int, int], Float[Tensor, "l t"]]


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Influence of one sequence by layer and position, in the unit of its score."""

    layers: tuple[str, ...]
    tokens: Int[Tensor, " t"]
    scores: Float[Tensor, "l t"]

    @property
    def total(self) -> float:
        """The sequence's influence: a grid sums to its score."""
        return float(self.scores.double().sum())


def token_grids(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, LowRank],
    batch: TokenBatch,
    num_training_sequences: int,
) -> Float[Tensor, "q n l t"]:
    """Influence by query, sequence, layer and position; nats of f per extra copy."""
    ios = run_pass(model, layers, batch, training_loss)
    grids = []
    for layer in layers:
        query = prepared[layer.name]
        io = ios.get(layer.name)
        if io is not None:
            cells = ByToken.of(query, layer.has_bias).tokens(io)
            grids.append(io.spread(cells, batch.tokens.shape[1]))
        else:  # an idle expert
            grids.append(query.left.new_zeros(query.num_queries, *batch.tokens.shape))
    return influence(torch.stack(grids, dim=2), num_training_sequences)


def rescore(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, LowRank],
    batch: TokenBatch,
    pairs: Sequence[tuple[int, int]],
    num_training_sequences: int,
) -> Rescored:
    """Influence of every query and sequence, and a token grid for each (query, row) of `pairs`.

    Tokens are contracted for the pairs alone: at full rank that is the dear part.
    """
    ios = run_pass(model, layers, batch, training_loss)
    raw = prepared[layers[0].name].left.new_zeros(
        prepared[layers[0].name].num_queries, len(batch.ids)
    )
    grids: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in pairs}
    for layer in layers:
        query, io = prepared[layer.name], ios.get(layer.name)
        if io is not None:
            raw = raw + meet(query.dense(), io.gradient())
        for q, n in pairs:
            if io is None:  # an idle expert
                cells = query.left.new_zeros(batch.tokens.shape[1])
            else:
                one = ByToken.of(query.select([q]), layer.has_bias)
                row = io.select(n)
                cells = row.spread(one.tokens(row), batch.tokens.shape[1])[0, 0]
            grids[q, n].append(cells)
    return Rescored(
        influence(raw, num_training_sequences),
        {
            pair: influence(torch.stack(cells), num_training_sequences)
            for pair, cells in grids.items()
        },
    )


def sparsity(scores: Float[Tensor, " t"]) -> float:
    """‖a‖₂ / ‖a‖₁ of tokenwise influence; above 2/3 the paper calls a sequence spurious (§5.3)."""
    total = float(scores.double().abs().sum())
    return float(scores.double().norm()) / total if total > 0 else 0.0
