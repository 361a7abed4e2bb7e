"""Training: against PyTorch's own optimiser, the choice from the grid, and many models at once."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from influence.examples import ExampleBatch
from influence.likelihoods import Gaussian, Softmax
from influence.objectives import forward
from influence.sequences import TokenBatch
from tasks.validation.datasets import Splits
from tasks.validation.networks import build
from tasks.validation.settings import Network, Perceptron, ResNet, Training, Transformer
from tasks.validation.training import (
    fit,
    mean_loss,
    minibatches,
    outputs_of_many,
    train,
    train_many,
)

MLP = Perceptron(widths=(6, 5), activation="tanh")
GPT2 = Transformer(blocks=1, width=8, heads=2, hidden=12)
RECIPE = Training(epochs=3, batch=4, momentum=0.9, learning_rates=(0.05,), weight_decays=(1e-3,))


def rows(num: int = 30) -> ExampleBatch:
    inputs = torch.randn(num, 3, generator=torch.Generator().manual_seed(0)).double()
    targets = (inputs.sum(dim=1, keepdim=True)).sin()
    return ExampleBatch(torch.arange(num), inputs, targets, Gaussian())


def classes() -> ExampleBatch:
    given = rows()
    return replace(given, targets=(given.targets[:, 0] > 0).long(), likelihood=Softmax())


def text() -> TokenBatch:
    tokens = torch.randint(0, 20, (30, 6), generator=torch.Generator().manual_seed(0))
    supervised = torch.ones(30, 6, dtype=torch.bool)
    supervised[:, 0] = False
    supervised[::3, :3] = False  # not as many supervised tokens in every sequence
    return TokenBatch(torch.arange(30), tokens, supervised)


def splits(batch, num_outputs: int) -> Splits:
    places = torch.arange(len(batch.ids)).split([20, 6, 4])
    train, validation, test = (batch.select(part) for part in places)
    return Splits(train, validation, test, num_outputs)


CASES = pytest.mark.parametrize(
    ("network", "given"),
    [(MLP, splits(rows(), 1)), (MLP, splits(classes(), 2)), (GPT2, splits(text(), 20))],
    ids=["regression", "classes", "text"],
)


def builder(network: Network, given: Splits):
    return lambda seed: build(network, given, torch.float64, seed)


def same(model: nn.Module, other: dict[str, torch.Tensor]) -> None:
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), other[name], atol=1e-10, rtol=1e-10)


# --- one model -----------------------------------------------------------------------------------


def test_a_minibatch_order_visits_every_example_each_epoch():
    orders = [list(minibatches(10, 4, 2, seed)) for seed in (0, 0, 1)]
    assert [len(places) for places in orders[0]] == [4, 4, 2] * 2
    for epoch in (orders[0][:3], orders[0][3:]):
        assert torch.cat(epoch).sort().values.equal(torch.arange(10))
    assert torch.cat(orders[0]).equal(torch.cat(orders[1]))
    assert not torch.cat(orders[0]).equal(torch.cat(orders[2]))
    assert not torch.cat(orders[0][:3]).equal(torch.cat(orders[0][3:]))


def test_fit_is_sgd_on_the_mean_loss():
    """By hand: m ← μ m + g + w θ, θ ← θ − η m (Sutskever et al. 2013, as PyTorch has it)."""
    given = splits(rows(), 1)
    trained, model = builder(MLP, given)(0), builder(MLP, given)(0)
    fit(trained, given.train, RECIPE, 0.05, 1e-3, 3, 0)
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    for places in minibatches(20, 4, 3, 0):
        batch = given.train.select(places)
        loss = ((model(batch.inputs) - batch.targets) ** 2).sum() / 2 / 4
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, m, g in zip(parameters, momenta, gradients, strict=True):
                m.mul_(0.9).add_(g + 1e-3 * p)
                p.sub_(0.05 * m)
    same(trained, {name: value.detach() for name, value in model.named_parameters()})
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())


@CASES
def test_training_lowers_the_loss_and_is_the_same_on_every_call(network, given):
    recipe = RECIPE.model_copy(update={"epochs": 20})
    first, told = train(builder(network, given), given, recipe, 0)
    again, _ = train(builder(network, given), given, recipe, 0)
    same(first, {name: value.detach() for name, value in again.named_parameters()})
    assert told.chosen.train_loss < mean_loss(builder(network, given)(0), given.train)
    assert told.chosen.train_loss == mean_loss(first, given.train)
    assert told.test_loss == mean_loss(first, given.test)


def test_the_loss_of_text_is_the_mean_over_supervised_tokens():
    given = splits(text(), 20)
    model = builder(GPT2, given)(0)
    batch = given.train
    assert isinstance(batch, TokenBatch)
    labels = batch.tokens.masked_fill(~batch.supervised, -100)[:, 1:]
    expected = nn.functional.cross_entropy(forward(model, batch)[:, :-1].mT, labels)
    assert mean_loss(model, batch) == pytest.approx(expected.item(), rel=1e-12)


def test_the_validation_loss_chooses_and_divergence_is_passed_over():
    given = splits(rows(), 1)
    grid = {"learning_rates": (1e-4, 0.05, 1e6), "weight_decays": (0.0, 1.0)}
    model, told = train(builder(MLP, given), given, RECIPE.model_copy(update=grid), 0)
    assert [(p.learning_rate, p.weight_decay) for p in told.grid] == [
        (rate, decay) for rate in grid["learning_rates"] for decay in grid["weight_decays"]
    ]
    converged = told.grid[:4]
    assert all(p.train_loss > 10 or math.isnan(p.train_loss) for p in told.grid[4:])
    assert told.chosen == min(converged, key=lambda p: p.validation_loss)
    assert told.chosen.validation_loss == mean_loss(model, given.validation)


def test_divergence_everywhere_is_told():
    given = splits(rows(), 1)
    recipe = RECIPE.model_copy(update={"learning_rates": (1e6,)})
    with pytest.raises(ValueError, match=r"diverged at every rate .*\(1e\+06\); add smaller"):
        train(builder(MLP, given), given, recipe, 0)


def test_a_network_with_batch_norm_is_evaluated_by_its_averages():
    images = torch.randn(20, 1, 8, 8)
    batch = ExampleBatch(torch.arange(20), images, torch.arange(20) % 10, Softmax())
    given = Splits(batch, batch, batch, 10)
    model, _ = train(
        lambda seed: build(ResNet(resnet=8), given, torch.float32, seed), given, RECIPE, 0
    )
    assert not model.training
    torch.testing.assert_close(model(images)[:3], model(images[:3]), atol=1e-5, rtol=1e-5)
    assert any(value.abs().sum() > 0 for name, value in model.named_buffers() if "mean" in name)


# --- many models ---------------------------------------------------------------------------------


@CASES
def test_each_of_many_models_is_trained_as_it_would_be_alone(network, given):
    subsets = [torch.randperm(20)[:10] for _ in range(3)]
    seeds = [0, 1, 0]
    make = builder(network, given)
    stacked = train_many(make, given.train, subsets, seeds, RECIPE, 0.05, 1e-3, 3)
    shown = given.test.inputs.expand(3, *given.test.inputs.shape)
    outputs = outputs_of_many(make(0), stacked, shown)
    for place, (subset, seed) in enumerate(zip(subsets, seeds, strict=True)):
        alone = make(seed)
        fit(alone, given.train.select(subset), RECIPE, 0.05, 1e-3, 3, seed)
        same(alone, {name: value[place] for name, value in stacked.items()})
        expected = forward(alone, given.test)
        torch.testing.assert_close(outputs[place], expected, atol=1e-10, rtol=1e-10)


def test_many_models_are_left_without_gradients():
    given = splits(rows(), 1)
    stacked = train_many(
        builder(MLP, given), given.train, [torch.arange(10)] * 2, [0, 1], RECIPE, 0.05, 0.0, 1
    )
    assert not any(value.requires_grad for value in stacked.values())


def test_what_cannot_be_trained_side_by_side_is_told():
    given = splits(rows(), 1)
    make = builder(MLP, given)
    rest = (RECIPE, 0.05, 0.0, 1)
    with pytest.raises(ValueError, match="subsets of one length"):
        train_many(make, given.train, [torch.arange(3), torch.arange(4)], [0, 1], *rest)
    with pytest.raises(ValueError, match="1 subsets and 2 seeds"):
        train_many(make, given.train, [torch.arange(3)], [0, 1], *rest)
    batch = ExampleBatch(
        torch.arange(5), torch.randn(5, 1, 8, 8).double(), torch.arange(5), Softmax()
    )
    resnet = builder(ResNet(resnet=8), Splits(batch, batch, batch, 10))
    with pytest.raises(ValueError, match=r"norm is a BatchNorm2d, .* retraining to null"):
        train_many(resnet, batch, [torch.arange(3)], [0], *rest)
