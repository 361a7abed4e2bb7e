"""Training the networks of the benchmarks: SGD with momentum, one at a time or many together.

The loss of a minibatch is the mean over its examples; for text, over its tokens, so that a rate
means the same for every length of context. Rates are constant, and a run of one seed is the same
on every call.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from influence.examples import Batch
from influence.objectives import forward, training_loss
from tasks.validation.datasets import Splits, random_generator
from tasks.validation.settings import Training

BuildModel = Callable[[int], nn.Module]  # a new model for a seed
EVALUATED = 512  # examples whose loss is computed at once


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One training: losses are means over examples or tokens, huge or NaN if it diverged."""

    learning_rate: float
    weight_decay: float
    train_loss: float
    validation_loss: float


@dataclass(frozen=True, slots=True)
class Trained:
    """How a model came about: the grid, and the point that the validation loss chose.

    Args:
        chosen: the point with the lowest validation loss.
        test_loss: of the model trained there.
        grid: every point.
        seconds: that the whole grid took.
    """

    chosen: GridPoint
    test_loss: float
    grid: tuple[GridPoint, ...]
    seconds: float


def train(
    build_model: BuildModel, splits: Splits, recipe: Training, seed: int
) -> tuple[nn.Module, Trained]:
    """The best of a grid of rates and weight decays (Grosse et al. 2023, App. C).

    Every point begins at the same weights and sees the same minibatches.

    Args:
        build_model: called with `seed`.
        splits: trained on the first part, chosen by the second.
        recipe: the grid and how long to train.
        seed: of the weights and of the order of minibatches.

    Returns:
        The model in evaluation mode, and how it came about.

    Raises:
        ValueError: if the training diverged at every point; one that ends with a training loss
            above that of the untrained model counts as diverged.
    """
    start, grid = time.perf_counter(), []
    best: tuple[float, nn.Module | None] = (math.inf, None)
    untrained, chosen = mean_loss(build_model(seed), splits.train), -1
    for rate, decay in product(recipe.learning_rates, recipe.weight_decays):
        model = build_model(seed)
        fit(model, splits.train, recipe, rate, decay, recipe.epochs, seed)
        losses = mean_loss(model, splits.train), mean_loss(model, splits.validation)
        # Not NaN, nor worse than no training, as a diverged model may be without being infinite.
        if losses[0] < untrained and losses[1] < best[0]:
            best, chosen = (losses[1], model), len(grid)
        grid.append(GridPoint(rate, decay, *losses))
    if best[1] is None:
        raise ValueError(
            f"training diverged at every rate of training.learning_rates "
            f"({', '.join(f'{rate:g}' for rate in recipe.learning_rates)}); add smaller ones"
        )
    test_loss, seconds = mean_loss(best[1], splits.test), time.perf_counter() - start
    return best[1], Trained(grid[chosen], test_loss, tuple(grid), seconds)


def fit(
    model: nn.Module,
    data: Batch,
    recipe: Training,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
    seed: int,
) -> None:
    """Train in place, until the epochs are over or the loss is not finite."""
    model.train()
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimiser = torch.optim.SGD(
        parameters, learning_rate, recipe.momentum, weight_decay=weight_decay
    )
    for places in minibatches(len(data.ids), recipe.batch, epochs, seed):
        batch = data.select(places)
        loss = training_loss(forward(model, batch), batch).sum() / len(batch.owners)
        optimiser.zero_grad()
        loss.backward()
        if not loss.isfinite():
            break
        optimiser.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def mean_loss(model: nn.Module, data: Batch) -> float:
    """The mean loss over examples, or over supervised tokens."""
    total, num = 0.0, 0
    for places in torch.arange(len(data.ids)).split(EVALUATED):
        batch = data.select(places)
        total += float(training_loss(forward(model, batch), batch).double().sum())
        num += len(batch.owners)
    return total / num


def minibatches(num: int, size: int, epochs: int, seed: int) -> Iterator[Int[Tensor, " _"]]:
    """Places of each minibatch, in a new random order every epoch; the last may be smaller."""
    generator = random_generator(seed, "minibatches")
    for _ in range(epochs):
        yield from torch.randperm(num, generator=generator).split(size)


def train_many(
    build_model: BuildModel,
    data: Batch,
    subsets: Sequence[Int[Tensor, " k"]],
    seeds: Sequence[int],
    recipe: Training,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
) -> dict[str, Float[Tensor, "m ..."]]:
    """Train many models side by side, each as `fit` would train it alone on its subset.

    Args:
        build_model: a new model for a seed; its structure must not depend on the seed.
        data: the examples that all subsets are taken from.
        subsets: of each model, places in `data`; all of one length.
        seeds: of each model, for its weights and its order of minibatches.
        recipe: momentum and size of a minibatch; rates and epochs are the next arguments.
        learning_rate: of all.
        weight_decay: of all.
        epochs: of all.

    Returns:
        The parameters by name, those of all models stacked: what `outputs_of_many` takes.

    Raises:
        ValueError: if the subsets differ in length, or the model has batch norm.
    """
    _check_together(subsets, seeds)
    models = [build_model(seed).requires_grad_() for seed in seeds]
    structure = models[0]
    _check_no_batch_norm(structure)
    stacked = stack_parameters(models)
    del models
    values = list(stacked.values())
    momenta = [torch.zeros_like(value) for value in values]
    rows = torch.stack([torch.as_tensor(subset) for subset in subsets])
    orders = (minibatches(rows.shape[1], recipe.batch, epochs, seed) for seed in seeds)
    for together in zip(*orders, strict=True):
        places = torch.gather(rows, 1, torch.stack(together))
        batch = data.select(places.flatten())
        outputs = outputs_of_many(structure, stacked, batch.inputs.unflatten(0, places.shape))
        # Models do not touch each other, so the gradient of the sum is that of each.
        losses = training_loss(outputs.flatten(0, 1), batch).unflatten(0, places.shape).sum(dim=1)
        num_rows = torch.bincount(batch.owners // places.shape[1], minlength=len(places))
        gradients = torch.autograd.grad((losses / num_rows).sum(), values)
        _step(values, momenta, list(gradients), learning_rate, recipe.momentum, weight_decay)
    return {name: value.detach() for name, value in stacked.items()}


def stack_parameters(models: Sequence[nn.Module]) -> dict[str, Float[Tensor, "m ..."]]:
    """The parameters of models of one structure by name, as leaves that can be trained."""
    parameters, _ = stack_module_state(list(models))
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def outputs_of_many(
    model: nn.Module, stacked: dict[str, Float[Tensor, "m ..."]], inputs: Tensor
) -> Float[Tensor, "m n ..."]:
    """The outputs of all models.

    Args:
        model: of their structure; its own parameters are not used.
        stacked: the parameters of all models.
        inputs: for each model its own, [m, n, ...]; `expand` shows all models the same.
    """

    def outputs(parameters: dict[str, Tensor], own: Tensor) -> Tensor:
        output = functional_call(model, parameters, (own,))
        return output if isinstance(output, Tensor) else output.logits

    return vmap(outputs)(stacked, inputs)


@torch.no_grad()
def _step(
    values: list[Tensor],
    momenta: list[Tensor],
    gradients: list[Tensor],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """A step of `torch.optim.SGD`, in place: m ← μ m + g + w θ, θ ← θ − η m."""
    for value, velocity, gradient in zip(values, momenta, gradients, strict=True):
        velocity.mul_(momentum).add_(gradient).add_(value, alpha=weight_decay)
        value.sub_(velocity, alpha=learning_rate)


def _check_together(subsets: Sequence[Tensor], seeds: Sequence[int]) -> None:
    if not subsets or len(subsets) != len(seeds):
        raise ValueError(
            f"{len(subsets)} subsets and {len(seeds)} seeds; give one seed for each subset"
        )
    if len({len(subset) for subset in subsets}) > 1:
        raise ValueError(
            "the subsets differ in length, and models that are trained side by side take their "
            "steps together; give subsets of one length"
        )


def _check_no_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose running averages belong to one "
                "model: such networks cannot be trained side by side; set retraining to null"
            )
