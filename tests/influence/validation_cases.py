"""Tiny problems of every kind, each as the package takes it and as the oracles do."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from influence.examples import ExampleBatch
from influence.layers import Layer
from influence.likelihoods import Gaussian, Softmax
from influence.validation.ggn import GaussNewton
from influence.validation.layout import Layout
from tests.influence import models
from tests.influence import validation_oracles as oracles


@dataclass(frozen=True)
class Case:
    """A model with its training data; `examples` are the same, one by one and unpadded."""

    model: nn.Module
    layers: tuple[Layer, ...]
    data: Any
    examples: list[oracles.Example]

    @property
    def modules(self) -> list[nn.Module]:
        return [layer.module for layer in self.layers]

    @property
    def layout(self) -> Layout:
        return Layout.of(self.layers)

    @property
    def curvature(self) -> GaussNewton:
        return GaussNewton(self.model, self.layout, self.data)

    @cached_property
    def G(self) -> Tensor:
        """The dense Gauss-Newton matrix."""
        return oracles.gauss_newton(self.examples, self.modules)

    @cached_property
    def dampings(self) -> dict[str, float]:
        """λ_ℓ, another one for each layer, so that none can stand for another."""
        mean = self.G.diagonal().mean().item()
        return {layer.name: mean * (0.2 + 0.3 * k) for k, layer in enumerate(self.layers)}

    @property
    def damping_vector(self) -> Tensor:
        """λ_ℓ on every parameter, counted out one by one."""
        numbers = [
            self.dampings[layer.name]
            for layer in self.layers
            for parameter in layer.module.parameters()
            for _ in range(parameter.numel())
        ]
        return torch.tensor(numbers, dtype=torch.float64)

    def vectors(self, number: int, seed: int = 0) -> Tensor:
        """Random vectors over the parameters."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(number, len(self.G), generator=generator, dtype=torch.float64)

    def loss_gradients(self) -> Tensor:
        """∇L of every example, [n, p]."""
        found = [oracles.gradient(oracles.example_loss(e), self.modules) for e in self.examples]
        return torch.stack(found)


class ConvolutionalNet(nn.Module):
    """Two convolutions, strided and padded with bias and dilated without, under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(3, 2, 2, dilation=(1, 2), bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).flatten(1))


def _examples(model: nn.Module, inputs: Tensor, targets: Tensor, softmax: bool) -> Case:
    ids = torch.arange(30, 30 + len(inputs))
    data = ExampleBatch(ids, inputs, targets, Softmax() if softmax else Gaussian())
    loss = oracles.cross_entropy if softmax else oracles.half_squared_error
    alone = [
        oracles.Example(lambda x=x: model(x[None]), [y], loss)
        for x, y in zip(inputs, targets, strict=True)
    ]
    return Case(model, models.attributed(model), data, alone)


def regression(seed: int = 0, number: int = 9) -> Case:
    """An MLP with squared loss on two outputs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return _examples(
        models.randomise(model, seed), _normal(seed + 1, number, 3), _normal(seed + 2, number, 2),
        softmax=False,
    )  # fmt: skip


def classification(seed: int = 0, number: int = 9) -> Case:
    """An MLP with softmax over three classes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    labels = torch.randint(3, (number,), generator=torch.Generator().manual_seed(seed + 2))
    return _examples(
        models.randomise(model, seed), _normal(seed + 1, number, 3), labels, softmax=True
    )


def images(seed: int = 0, number: int = 6) -> Case:
    """A convolutional net with softmax over three classes."""
    labels = torch.randint(3, (number,), generator=torch.Generator().manual_seed(seed + 2))
    return _examples(
        models.randomise(ConvolutionalNet(), seed), _normal(seed + 1, number, 2, 5, 4), labels,
        softmax=True,
    )  # fmt: skip


def linear(seed: int = 0, number: int = 9) -> Case:
    """One linear layer with squared loss: its proximal objective is quadratic."""
    model = nn.Sequential(nn.Linear(3, 2))
    return _examples(
        models.randomise(model, seed), _normal(seed + 1, number, 3), _normal(seed + 2, number, 2),
        softmax=False,
    )  # fmt: skip


def with_an_outlier(seed: int = 0, number: int = 12) -> Case:
    """The same, with the inputs of one example 20 times as large: 400 times its curvature."""
    model = nn.Sequential(nn.Linear(3, 2))
    inputs = _normal(seed + 1, number, 3)
    inputs[number // 2] *= 20
    return _examples(
        models.randomise(model, seed), inputs, _normal(seed + 2, number, 2), softmax=False
    )


def tokens(model: nn.Module, lengths: tuple[int, ...] = (6, 3, 5, 2)) -> Case:
    """A language model on sequences of unequal length, some with a prompt."""
    sequences = models.corpus(lengths=lengths)
    alone = []
    for row, supervised in sequences:
        places = [t for t in range(len(row)) if supervised[t]]

        def run(row: Tensor = row, places: list[int] = places) -> Tensor:
            output = model(row[None]).logits[0]
            return torch.stack([output[t - 1] for t in places])

        alone.append(oracles.Example(run, [row[t] for t in places], oracles.cross_entropy))
    return Case(model, models.attributed(model), models.batch(sequences), alone)


def _normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


_MAKERS: dict[str, Callable[[], Case]] = {
    "regression": regression,
    "classification": classification,
    "images": images,
    "mlp of tokens": lambda: tokens(models.mlp()),
    "gpt2": lambda: tokens(models.gpt2()),
}
NAMES = tuple(_MAKERS)
_made: dict[str, Case] = {}


def of(name: str) -> Case:
    """The case of that name, made once a session: no test changes it."""
    if name not in _made:
        _made[name] = _MAKERS[name]()
    return _made[name]
