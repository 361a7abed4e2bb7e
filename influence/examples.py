"""Batches of single examples, regression and classification, beside those of token sequences."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.likelihoods import Likelihood
from influence.sequences import TokenBatch


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Examples with one row of outputs each.

    Args:
        ids: a stable key for each example, independent of batch and order.
        inputs: what the model is called with.
        targets: a class each for `Softmax`, a vector each for `Gaussian`.
        likelihood: how outputs speak of targets.
    """

    ids: Int[Tensor, " n"]
    inputs: Float[Tensor, "n ..."]
    targets: Tensor
    likelihood: Likelihood

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.inputs) == len(self.targets):
            raise ValueError(
                f"{len(self.ids)} ids, {len(self.inputs)} inputs and {len(self.targets)} targets; "
                "give one of each for every example"
            )

    @property
    def owners(self) -> Int[Tensor, " n"]:
        """Every example has one row."""
        return torch.arange(len(self.ids), device=self.ids.device)

    def rows(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """All outputs carry a loss."""
        return outputs

    def row_labels(self, labels: Tensor) -> Tensor:
        """As they are."""
        return labels

    def select(self, places: Int[Tensor, " k"]) -> "ExampleBatch":
        """Some of the examples, in the order given."""
        return ExampleBatch(
            self.ids[places], self.inputs[places], self.targets[places], self.likelihood
        )

    def to(self, device: torch.device | str) -> "ExampleBatch":
        """The same batch on another device."""
        ids, inputs, targets = (each.to(device) for each in (self.ids, self.inputs, self.targets))
        return ExampleBatch(ids, inputs, targets, self.likelihood)

    def split(self, size: int) -> list["ExampleBatch"]:
        """Batches of at most `size` examples."""
        return [self.select(places) for places in torch.arange(len(self.ids)).split(size)]


Batch = TokenBatch | ExampleBatch
