"""A layer's matrix (W b), and the model's own parameters that hold it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.layers import Layer


def weight_name(layer: Layer) -> str:
    """The name of the layer's weight among the model's parameters."""
    return f"{layer.name}.weight"


def bias_name(layer: Layer) -> str:
    """The name of the layer's bias among the model's parameters."""
    return f"{layer.name}.bias"


def to_parameters(
    layer: Layer, block: Float[Tensor, "*k d_out d_in"]
) -> dict[str, Float[Tensor, "..."]]:
    """A matrix (W b) as the layer's own parameters have it, by the model's parameter names."""
    weight = block[..., :-1] if layer.has_bias else block
    if type(layer.module).__name__ == "Conv1D":
        weight = weight.mT
    elif isinstance(layer.module, nn.Conv2d):
        weight = weight.unflatten(-1, layer.module.weight.shape[1:])
    return {weight_name(layer): weight} | (
        {bias_name(layer): block[..., -1]} if layer.has_bias else {}
    )


def from_parameters(
    layer: Layer, parameters: Mapping[str, Float[Tensor, "..."]]
) -> Float[Tensor, "*k d_out d_in"]:
    """The inverse of `to_parameters`: (W b), the bias in the last column."""
    weight = parameters[weight_name(layer)]
    if type(layer.module).__name__ == "Conv1D":
        weight = weight.mT
    elif isinstance(layer.module, nn.Conv2d):
        weight = weight.flatten(-3)
    if not layer.has_bias:
        return weight
    return torch.cat([weight, parameters[bias_name(layer)].unsqueeze(-1)], dim=-1)
