"""Batches of single examples: gradients, labels, factors and spectra, against one by one."""

import pytest
import torch
from torch import nn

from influence.eigenbasis import EigenBasis, eigendecompose
from influence.examples import ExampleBatch
from influence.factors import fit_factors
from influence.likelihoods import Gaussian, Softmax
from influence.objectives import forward, log_probability, sample_labels, training_loss
from influence.spectrum import fit_spectra
from influence.validation import gradients
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles

EXAMPLES = ["regression", "classification", "images"]


def drawn_labels(case: cases.Case, seed: int) -> list[list[torch.Tensor]]:
    """The label of each example that a fit with this seed draws."""
    with torch.no_grad():
        outputs = forward(case.model, case.data)
    return [[label] for label in sample_labels(outputs, case.data, seed)]


def test_a_batch_needs_one_id_and_one_target_for_every_example():
    with pytest.raises(ValueError, match="3 ids, 3 inputs and 2 targets"):
        ExampleBatch(torch.arange(3), torch.zeros(3, 1), torch.zeros(2, 1), Gaussian())


def test_selecting_and_splitting_keep_id_input_and_target_together():
    batch = cases.of("classification").data
    picked = batch.select(torch.tensor([4, 0]))
    assert picked.ids.tolist() == [34, 30]
    assert torch.equal(picked.inputs, batch.inputs[[4, 0]])
    assert torch.equal(picked.targets, batch.targets[[4, 0]])
    assert picked.likelihood is batch.likelihood
    parts = batch.split(4)
    assert [len(part.ids) for part in parts] == [4, 4, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_losses_are_those_of_the_examples_one_by_one(name):
    case = cases.of(name)
    with torch.no_grad():
        outputs = forward(case.model, case.data)
        wanted = torch.stack([oracles.example_loss(example) for example in case.examples])
    torch.testing.assert_close(training_loss(outputs, case.data), wanted)
    torch.testing.assert_close(log_probability(outputs, case.data), -wanted)


@pytest.mark.parametrize("at_once", [128, 2])
@pytest.mark.parametrize("name", cases.NAMES)
def test_the_gradients_of_examples_are_autograds_one_by_one(name, at_once, monkeypatch):
    monkeypatch.setattr(gradients, "EXAMPLES", at_once)
    case = cases.of(name)
    wanted = case.loss_gradients()
    got = gradients.loss_gradients(case.model, case.layers, case.data)
    assert models.relative_error(case.layout.vector(got), wanted) < 1e-10
    f = gradients.measurement_gradients(case.model, case.layers, case.data)
    assert models.relative_error(case.layout.vector(f), -wanted) < 1e-10


@pytest.mark.parametrize("name", cases.NAMES)
def test_inner_products_and_norms_are_those_of_the_dense_gradients(name, monkeypatch):
    monkeypatch.setattr(gradients, "EXAMPLES", 3)
    case, wanted = cases.of(name), cases.of(name).loss_gradients()
    V = case.vectors(2)
    got = gradients.inner_products(case.model, case.layers, case.layout.blocks(V), case.data)
    assert models.relative_error(got, V @ wanted.T) < 1e-10
    norms = gradients.squared_norms(case.model, case.layers, case.data, training_loss)
    assert models.relative_error(norms, (wanted**2).sum(1)) < 1e-10


@pytest.mark.parametrize("likelihood", [Softmax(), Gaussian()])
def test_labels_depend_on_seed_and_id_and_not_on_batch_or_order(likelihood):
    n = 40
    inputs, ids = torch.randn(n, 3).double(), torch.arange(700, 700 + n)
    targets = torch.zeros(n).long() if isinstance(likelihood, Softmax) else torch.zeros(n, 3)
    batch = ExampleBatch(ids, inputs, targets, likelihood)
    together = sample_labels(inputs, batch, 5)
    order = torch.randperm(n)
    for places in (order, order[:7], order[7:8]):
        assert torch.equal(sample_labels(inputs[places], batch.select(places), 5), together[places])
    assert not torch.equal(sample_labels(inputs, batch, 6), together)
    others = ExampleBatch(ids + n, inputs, targets, likelihood)
    assert not torch.equal(sample_labels(inputs, others, 5), together)


def test_the_noise_of_two_outputs_of_one_example_is_not_the_same():
    n = 2000
    batch = ExampleBatch(torch.arange(n), torch.zeros(n, 1), torch.zeros(n, 2), Gaussian())
    noise = sample_labels(torch.zeros(n, 2).double(), batch, 0)
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 4 / n**0.5
    assert (noise[:-1, 0] * noise[1:, 0]).mean().abs() < 4 / n**0.5


@pytest.mark.parametrize("batch_size", [100, 4])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_factors_are_the_means_over_examples_and_places_for_the_labels_drawn(name, batch_size):
    case = cases.of(name)
    factors = fit_factors(case.model, case.layers, case.data.split(batch_size), 3)
    labels = drawn_labels(case, 3)
    for layer in case.layers:
        A, S = oracles.kronecker_factors(layer.module, case.examples, labels)
        torch.testing.assert_close(factors.of(layer).A.value, A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(factors.of(layer).S.value, S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [100, 4])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_spectrum_is_the_mean_square_of_rotated_gradients_for_the_labels_drawn(
    name, batch_size
):
    case = cases.of(name)
    bases = {
        layer.name: EigenBasis(models.orthogonal(1, layer.d_in), models.orthogonal(2, layer.d_out))
        for layer in case.layers
    }
    found = fit_spectra(case.model, case.layers, bases, case.data.split(batch_size), 4)
    for layer in case.layers:
        total, basis = 0, bases[layer.name]
        for example, labels in zip(case.examples, drawn_labels(case, 4), strict=True):
            g = oracles.gradient(oracles.example_loss(example, labels), [layer.module])
            total = total + (basis.Q_S.T @ g.reshape(layer.d_out, -1) @ basis.Q_A) ** 2
        wanted = total / len(case.examples)
        torch.testing.assert_close(found[layer.name].values, wanted, rtol=1e-9, atol=1e-12)


def test_examples_and_models_in_float32_go_through():
    """Uniforms are float64; what is drawn is in the dtype of the outputs."""
    model = nn.Linear(2, 2)
    batch = ExampleBatch(torch.arange(3), torch.randn(3, 2), torch.randn(3, 2), Gaussian())
    assert sample_labels(forward(model, batch), batch, 0).dtype == torch.float32


def test_factors_in_an_eigenbasis_are_diagonal():
    """The eigenvectors of A and S of an image diagonalise the mean over its places too."""
    case = cases.of("images")
    factors = fit_factors(case.model, case.layers, [case.data], 3)
    for layer in case.layers:
        A = factors.of(layer).A.value
        Q = eigendecompose(A, layer.name).vectors
        rotated = Q.T @ A @ Q
        assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-10 * rotated.abs().max()
