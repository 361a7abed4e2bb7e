"""Token attribution: how much of a score enters at which position (Grosse et al. 2023, Eq. 31).

A cell (ℓ, t) belongs to the position where the update happens, the token *before* the predicted
one. It is not the effect of erasing the token: ds_t mixes all later losses (§3.3 of the paper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.contraction import ByToken, meet
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import training_loss
from influence.passes import run_pass
from influence.products import product
from influence.scores import influence
from influence.sequences import TokenBatch


@dataclass(frozen=True, slots=True)
class Rescored:
    """Influence of a batch on all queries by layer, and token grids of the pairs asked for."""

    scores: Float[Tensor, "q n l"]
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
    grids = [grid.to(batch.ids.device) for grid in grids]
    return influence(torch.stack(grids, dim=2), num_training_sequences)


def rescore(
    model: nn.Module,
    layers: Sequence[Layer],
    solved: Mapping[str, Float[Tensor, "q d_out d_in"]],
    batch: TokenBatch,
    pairs: Sequence[tuple[int, int]],
    num_training_sequences: int,
) -> Rescored:
    """Influence on every query of full rank, by layer, and a token grid of each of `pairs`.

    Tokens are contracted for the pairs alone: at full rank that is the dear part.

    Args:
        model: in evaluation mode.
        layers: the attributed layers, or some of them: of others nothing is told.
        solved: (G + λI)⁻¹∇f of each of these layers, a matrix a query.
        batch: the sequences.
        pairs: (query, row of the batch).
        num_training_sequences: N.
    """
    ios = run_pass(model, layers, batch, training_loss)
    raw: list[Tensor] = []
    grids: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in pairs}
    for layer in layers:
        V, io = solved[layer.name], ios.get(layer.name)
        if io is None:  # an idle expert
            raw.append(V.new_zeros(len(V), len(batch.ids)))
        else:
            raw.append(meet(V, io.gradient()))
        raw[-1] = raw[-1].to(batch.ids.device)
        for q, n in pairs:
            if io is None:
                cells = V.new_zeros(batch.tokens.shape[1])
            else:
                cells = _cells(V[q], io.select(n), batch.tokens.shape[1])
            grids[q, n].append(cells.to(batch.ids.device))
    return Rescored(
        influence(torch.stack(raw, dim=-1), num_training_sequences),
        {
            pair: influence(torch.stack(cells), num_training_sequences)
            for pair, cells in grids.items()
        },
    )


def _cells(
    V: Float[Tensor, "d_out d_in"], io: LayerIO, num_positions: int
) -> Float[Tensor, " positions"]:
    """ds_tᵀ V [a_t; 1] of one sequence, at each of its positions."""
    bias = V[:, -1] if io.has_bias else None
    outputs = product(io.a, V[:, : io.a.shape[-1]].mT, bias)
    columns = (outputs * io.ds).sum(dim=-1)
    return io.spread(columns.unsqueeze(0), num_positions)[0, 0]


def sparsity(scores: Float[Tensor, " t"]) -> float:
    """‖a‖₂ / ‖a‖₁ of tokenwise influence; above 2/3 the paper calls a sequence spurious (§5.3)."""
    total = float(scores.double().abs().sum())
    return float(scores.double().norm()) / total if total > 0 else 0.0
