"""Queries: ∇f with f = log p(completion | prompt), preconditioned once and truncated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.damping import Damping
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import log_probability
from influence.passes import run_pass
from influence.sequences import TokenBatch, batches_by_tokens
from influence.solver import LayerSolver


@dataclass(frozen=True, slots=True)
class Query:
    """What the model was asked and what it said, as token ids."""

    name: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __post_init__(self) -> None:
        for part in ("prompt", "completion"):
            if not getattr(self, part):
                raise ValueError(
                    f"query {self.name!r} has an empty {part}; f = log p(completion | prompt) "
                    "needs at least one token of each"
                )


def query_batch(queries: Sequence[Query]) -> TokenBatch:
    """Queries as a batch: the completion is supervised, the prompt is not (Eq. 24).

    The ids are the queries' places in the list.
    """
    tokens = [torch.tensor(query.prompt + query.completion) for query in queries]
    supervised = [
        torch.arange(len(row)) >= len(query.prompt)
        for row, query in zip(tokens, queries, strict=True)
    ]
    return TokenBatch.collate(range(len(queries)), tokens, supervised)


def query_gradients(
    model: nn.Module, layers: Sequence[Layer], queries: Sequence[Query], tokens_per_batch: int
) -> dict[str, Float[Tensor, "q d_out d_in"]]:
    """∇f of every layer and query; a layer that a query does not run has gradient 0 there."""
    parameter = next(model.parameters())
    gradients = {
        layer.name: torch.zeros(
            len(queries), layer.d_out, layer.d_in, dtype=parameter.dtype, device=parameter.device
        )
        for layer in layers
    }
    lengths = [len(query.prompt) + len(query.completion) for query in queries]
    for rows in batches_by_tokens(lengths, tokens_per_batch):
        batch = query_batch([queries[row] for row in rows]).to(parameter.device)
        for name, io in run_pass(model, layers, batch, log_probability).items():
            gradients[name][rows] = io.gradient()
    return gradients


def prepare(
    gradients: Mapping[str, Float[Tensor, "q d_out d_in"]],
    solvers: Mapping[str, LayerSolver],
    damping: Damping,
    rank: int | None,
) -> dict[str, LowRank]:
    """(G + λI)⁻¹∇f of every layer, truncated to `rank` (None: full rank)."""
    return {name: _prepare_layer(V, solvers[name], damping, rank) for name, V in gradients.items()}


def _prepare_layer(
    V: Float[Tensor, "q d_out d_in"], solver: LayerSolver, damping: Damping, rank: int | None
) -> LowRank:
    if not isinstance(solver, EKFACBlock):
        return LowRank.of(solver.solve(V, damping), rank)
    # The truncated SVD commutes with a rotation: truncate in the eigenbasis and rotate only the
    # factors back.
    rotated = LowRank.of(solver.solve_rotated(solver.basis.rotate(V), damping), rank)
    return rotated.mapped(solver.basis.unrotate_outputs, solver.basis.unrotate_inputs)
