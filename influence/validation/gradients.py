"""Gradients of examples one by one, and scores from them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.contraction import meet
from influence.examples import Batch
from influence.layers import Layer
from influence.objectives import log_probability, training_loss
from influence.passes import run_pass

EXAMPLES = 128  # gradients formed at once


def measurement_gradients(
    model: nn.Module, layers: Sequence[Layer], queries: Batch
) -> dict[str, Float[Tensor, "q d_out d_in"]]:
    """∇f of every query, f = log p(target | input) being the measurement."""
    return example_gradients(model, layers, queries, log_probability)


def loss_gradients(
    model: nn.Module, layers: Sequence[Layer], examples: Batch
) -> dict[str, Float[Tensor, "n d_out d_in"]]:
    """∇L of every training example."""
    return example_gradients(model, layers, examples, training_loss)


def example_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    examples: Batch,
    objective: Callable[[Tensor, Batch], Float[Tensor, " n"]],
) -> dict[str, Float[Tensor, "n d_out d_in"]]:
    """The gradient of `objective` for each example, by layer."""
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for places in torch.arange(len(examples.ids)).split(EXAMPLES):
        for name, io in run_pass(model, layers, examples.select(places), objective).items():
            parts[name].append(io.gradient())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def inner_products(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, Float[Tensor, "q d_out d_in"]],
    examples: Batch,
) -> Float[Tensor, "q n"]:
    """⟨V_q, ∇L(z_n)⟩ over all layers; raw, as `influence.scores.influence` takes it."""
    columns = []
    for places in torch.arange(len(examples.ids)).split(EXAMPLES):
        ios = run_pass(model, layers, examples.select(places), training_loss)
        columns.append(sum(meet(prepared[name], io.gradient()) for name, io in ios.items()))
    return torch.cat(columns, dim=1)


def squared_norms(
    model: nn.Module,
    layers: Sequence[Layer],
    examples: Batch,
    objective: Callable[[Tensor, Batch], Float[Tensor, " n"]],
) -> Float[Tensor, " n"]:
    """‖∇‖² of each example over all layers."""
    rows = []
    for places in torch.arange(len(examples.ids)).split(EXAMPLES):
        ios = run_pass(model, layers, examples.select(places), objective)
        rows.append(sum(io.gradient().square().sum(dim=(1, 2)) for io in ios.values()))
    return torch.cat(rows)
