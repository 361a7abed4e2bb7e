"""Queries prepared the obvious way: all gradients, solved densely, then truncated."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.damping import Damping
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import log_probability
from influence.passes import run_pass
from influence.queries import Query, query_batch
from influence.sequences import batches_by_tokens
from influence.solver import LayerSolver


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
    return {
        name: LowRank.of(solvers[name].solve(V, damping), rank) for name, V in gradients.items()
    }
