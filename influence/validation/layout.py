"""Vectors over all attributed parameters: one row of numbers for the matrices of all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.layers import Layer
from influence.parameters import from_parameters, to_parameters


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each layer's (W b) stands in a vector; layers in order, rows of (W b) in turn."""

    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Length of a vector (p)."""
        return sum(layer.d_out * layer.d_in for layer in self.layers)

    def vector(self, blocks: Mapping[str, Float[Tensor, "*k d_out d_in"]]) -> Float[Tensor, "*k p"]:
        """The matrices of all layers as one vector."""
        return torch.cat([blocks[layer.name].flatten(-2) for layer in self.layers], dim=-1)

    def blocks(self, vector: Float[Tensor, "*k p"]) -> dict[str, Float[Tensor, "*k d_out d_in"]]:
        """The inverse of `vector`."""
        sizes = [layer.d_out * layer.d_in for layer in self.layers]
        parts = vector.split(sizes, dim=-1)
        return {
            layer.name: part.unflatten(-1, (layer.d_out, layer.d_in))
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def parameters(self, vector: Float[Tensor, "*k p"]) -> dict[str, Float[Tensor, "..."]]:
        """The vector as the model's own parameters, by name."""
        blocks = self.blocks(vector)
        return {
            name: value
            for layer in self.layers
            for name, value in to_parameters(layer, blocks[layer.name]).items()
        }

    def from_parameters(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "*k p"]:
        """The inverse of `parameters`; other parameters are ignored."""
        return self.vector(
            {layer.name: from_parameters(layer, parameters) for layer in self.layers}
        )

    def current(self) -> Float[Tensor, " p"]:
        """The parameters that the layers' modules hold now."""
        return self.from_parameters(
            {
                f"{layer.name}.{name}": parameter.detach()
                for layer in self.layers
                for name, parameter in layer.module.named_parameters(recurse=False)
            }
        )

    def by_layer(self, values: Mapping[str, float], like: Tensor) -> Float[Tensor, " p"]:
        """A vector that is constant within each layer: λ_ℓ on every parameter of layer ℓ."""
        return torch.cat(
            [
                like.new_full((layer.d_out * layer.d_in,), values[layer.name])
                for layer in self.layers
            ]
        )

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Layout":
        """The layout of these layers, in their order."""
        return cls(tuple(layers))
