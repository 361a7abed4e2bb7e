"""The proximal Bregman response: its objective word for word, its optimum, and its derivative."""

import dataclasses

import pytest
import torch

from influence.sequences import TokenBatch
from influence.validation.nystrom import Nystrom
from influence.validation.pbrf import ProximalObjective, Response, respond
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


def objective(case: cases.Case) -> ProximalObjective:
    return ProximalObjective(case.model, case.layout, case.data, case.dampings)


def solve(
    case: cases.Case, places: list[int], epsilon: float, tolerance: float, most: int = 200
) -> Response:
    """The responses of some of the training examples, with G itself as the preconditioner."""
    inverse = Nystrom.of(case.curvature, len(case.G), seed=0).inverse(case.dampings)
    extra = case.data.select(torch.tensor(places))
    return respond(objective(case), inverse.apply, extra, epsilon, tolerance, most)


@pytest.mark.parametrize("name", cases.NAMES)
def test_value_and_gradient_are_those_of_the_objective_written_out(name):
    """Far from θˢ, a training example of its own for each row, λ another for each layer."""
    case = cases.of(name)
    offsets = 0.3 * case.vectors(2)
    extra = case.data.select(torch.tensor([2, 0]))
    few = dataclasses.replace(objective(case), examples_at_once=2)
    wanted = [
        oracles.proximal_objective(
            case.examples, case.modules, case.examples[n], 0.7, case.damping_vector, offset
        )
        for n, offset in zip((2, 0), offsets, strict=True)
    ]
    for of in (objective(case), few):
        values, got = of.values(offsets, extra, 0.7)
        for value, gradient, (Q, slope) in zip(values, got, wanted, strict=True):
            assert value.item() == pytest.approx(Q.item(), rel=1e-10)
            assert models.relative_error(gradient, slope) < 1e-10
        assert not got.requires_grad  # or every evaluation would hang on the last


def test_at_rest_only_the_example_pulls():
    """D and ‖θ − θˢ‖² have their minimum at θˢ: there ∇Q = ε∇L."""
    case = cases.of("classification")
    nowhere = torch.zeros(len(case.data.ids), len(case.G)).double()
    _, got = objective(case).values(nowhere, case.data, -0.2)
    assert models.relative_error(got, -0.2 * case.loss_gradients()) < 1e-10


def test_padding_and_prompts_add_nothing():
    case = cases.of("mlp of tokens")
    tokens, supervised = case.data.tokens, case.data.supervised
    wider = torch.randint(models.VOCABULARY, (len(tokens), tokens.shape[1] + 3))
    wider[:, : tokens.shape[1]] = torch.where(
        torch.arange(tokens.shape[1]) > supervised.int().cumsum(1).argmax(1)[:, None],
        wider[:, : tokens.shape[1]],
        tokens,
    )
    padded = torch.cat([supervised, torch.zeros(len(tokens), 3, dtype=torch.bool)], dim=1)
    batch = TokenBatch(case.data.ids, wider, padded)
    offsets = 0.3 * case.vectors(2)
    plain, other = (
        ProximalObjective(case.model, case.layout, data, case.dampings).values(
            offsets, data.select(torch.tensor([1, 3])), 0.5
        )[1]
        for data in (case.data, batch)
    )
    assert models.relative_error(other, plain) < 1e-12
    all_supervised = dataclasses.replace(
        case.data, supervised=case.data.supervised | (torch.arange(tokens.shape[1]) > 0)
    )
    counted = ProximalObjective(case.model, case.layout, all_supervised, case.dampings)
    _, wrong = counted.values(offsets, case.data.select(torch.tensor([1, 3])), 0.5)
    assert models.relative_error(wrong, plain) > 0.05  # measured where both are counted


@pytest.mark.parametrize("epsilon", [0.3, -0.05])
def test_for_a_linear_model_with_squared_loss_the_response_has_a_closed_form(epsilon):
    """Q is quadratic: δ = −ε (G + Λ)⁻¹ ∇L(z, θˢ + δ), and ∇L(z, θˢ + δ) = ∇L + JᵀJ δ."""
    case = cases.linear()
    dampings = case.damping_vector.diag()
    found = solve(case, list(range(9)), epsilon, 1e-12)
    assert found.converged.all()
    for n, example in enumerate(case.examples):
        gradient = case.loss_gradients()[n]
        J = oracles.jacobian(example, case.modules)[0]
        wanted = -epsilon * torch.linalg.solve(case.G + dampings + epsilon * J.T @ J, gradient)
        assert models.relative_error(found.offsets[n], wanted) < 1e-8
        at_the_optimum = gradient + J.T @ J @ wanted
        fixed = -epsilon * torch.linalg.solve(case.G + dampings, at_the_optimum)
        assert models.relative_error(found.offsets[n], fixed) < 1e-8


@pytest.mark.parametrize("epsilon", [0.05, -0.02])
@pytest.mark.parametrize("name", ["classification", "mlp of tokens"])
def test_at_the_response_the_gradient_of_the_objective_vanishes(name, epsilon):
    """The literal one, by autograd; it was ε∇L at rest."""
    case, places = cases.of(name), [0, 3]
    found = solve(case, places, epsilon, 1e-7)
    assert found.converged.all()
    assert (found.residuals <= 1e-7).all()
    for n, offset in zip(places, found.offsets, strict=True):
        _, left = oracles.proximal_objective(
            case.examples, case.modules, case.examples[n], epsilon, case.damping_vector, offset
        )
        assert left.norm() < 1e-5 * (epsilon * case.loss_gradients()[n]).norm()
        assert offset.norm() > 1e-4


@pytest.mark.parametrize("name", ["regression", "classification", "images", "mlp of tokens"])
def test_the_derivative_at_zero_is_minus_the_dense_inverse_times_the_loss_gradient(name):
    """Grosse et al. 2023, Eq. 9: the sign, the scale and each layer's damping."""
    case, epsilon = cases.of(name), 1e-5
    plus, minus = (solve(case, [0, 2], sign * epsilon, 1e-9) for sign in (1, -1))
    assert plus.converged.all()
    assert minus.converged.all()
    derivative = (plus.offsets - minus.offsets) / (2 * epsilon)
    gradients = case.loss_gradients()[[0, 2]]
    wanted = -oracles.damped_solve(case.G, case.damping_vector, gradients)
    assert models.relative_error(derivative, wanted) < 1e-5


def test_too_few_evaluations_are_reported_and_not_taken_on_faith():
    case = cases.of("classification")
    few, enough = (solve(case, [0, 1], 0.05, 1e-8, most) for most in (4, 200))
    assert not few.converged.any()
    assert (few.residuals > 1e-8).all()
    assert few.evaluations.max() <= 4
    assert enough.converged.all()
    assert (enough.evaluations > few.evaluations).all()


def test_an_example_without_gradient_moves_nothing():
    """Its target is the output itself, beside one that does pull."""
    case = cases.linear()
    with torch.no_grad():
        targets = case.model(case.data.inputs[:1])
    still = dataclasses.replace(
        case.data, targets=torch.cat([targets, case.data.targets[1:]])
    ).select(torch.tensor([0, 1]))
    inverse = Nystrom.of(case.curvature, len(case.G), seed=0).inverse(case.dampings)
    found = respond(objective(case), inverse.apply, still, 0.1, 1e-8, 100)
    assert found.converged.all()
    assert found.offsets[0].abs().max() < 1e-12
    assert found.offsets[1].abs().max() > 1e-3
    assert found.offsets.isfinite().all()
