"""The exact Gauss-Newton matrix and its solves, against the dense matrix."""

import dataclasses

import pytest
import torch

from influence.damping import RelativeDamping
from influence.solver import Blockwise, GradientDot
from influence.validation.estimators import fit_curvature
from influence.validation.ggn import (
    ExactGaussNewton,
    conjugate_gradients,
    curvature_product,
    preconditioner_of,
    top_eigenvalue,
    trace,
)
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


def identity(case: cases.Case) -> Blockwise:
    return Blockwise({layer.name: GradientDot() for layer in case.layers})


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_product_is_the_dense_mean_of_jacobian_hessian_jacobian(name):
    case, V = cases.of(name), cases.of(name).vectors(5)
    assert models.relative_error(case.curvature.product(V), V @ case.G) < 1e-12
    summed = curvature_product(case.model, case.layout, case.data, V)
    assert models.relative_error(summed, len(case.examples) * V @ case.G) < 1e-12


@pytest.mark.parametrize("name", ["classification", "images", "gpt2"])
def test_the_gauss_newton_matrix_is_the_fisher_matrix_with_all_labels_enumerated(name):
    """Softmax with cross-entropy is a matching loss: EK-FAC samples what this multiplies."""
    case, V = cases.of(name), cases.of(name).vectors(3)
    wanted = V @ oracles.fisher(case.examples, case.modules)
    assert models.relative_error(case.curvature.product(V), wanted) < 1e-10


@pytest.mark.parametrize("name", cases.NAMES)
def test_examples_and_vectors_at_once_change_nothing_but_rounding(name):
    case, V = cases.of(name), cases.of(name).vectors(5)
    few = dataclasses.replace(case.curvature, examples_at_once=2, vectors_at_once=3)
    assert models.relative_error(few.product(V), case.curvature.product(V)) < 1e-12


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_product_over_some_examples_is_the_mean_over_those(name):
    case, V = cases.of(name), cases.of(name).vectors(2)
    wanted = oracles.gauss_newton([case.examples[3], case.examples[1]], case.modules)
    got = case.curvature.product(V, torch.tensor([3, 1]))
    assert models.relative_error(got, V @ wanted) < 1e-12


def test_products_record_no_graph_of_parameters_that_are_not_attributed():
    """Else every step of a solve would hang on the one before, to the last of a long run."""
    case = cases.of("gpt2")
    assert any(p.requires_grad for p in case.model.parameters())
    assert not case.curvature.product(case.vectors(1)).requires_grad


def spd(size: int, condition: float) -> torch.Tensor:
    Q = models.orthogonal(3, size)
    return Q @ torch.logspace(0, torch.tensor(condition).log10().item(), size).double().diag() @ Q.T


def test_conjugate_gradients_solve_all_right_sides_to_the_true_residual():
    """Among them a zero one, an eigenvector (done after a step) and one that takes all steps."""
    A = spd(30, 1e5)
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    b[1] = 0
    b[2] = torch.linalg.eigh(A).eigenvectors[:, 4]
    b[3] *= 1e-9
    found = conjugate_gradients(lambda p: p @ A, b, lambda r: r, 1e-10, 500)
    assert found.converged
    assert found.x.isfinite().all()
    assert torch.equal(found.x[1], torch.zeros(30).double())
    wanted = torch.linalg.solve(A, b.T).T
    for got, exact, right in zip(found.x, wanted, b, strict=True):
        assert (got @ A - right).norm() <= 1.01e-10 * right.norm()
        assert (got - exact).norm() <= 1e-8 * exact.norm()


def test_conjugate_gradients_with_the_inverse_as_preconditioner_take_one_step():
    A = spd(12, 1e4)
    b = torch.randn(3, 12, dtype=torch.float64)
    inverse = torch.linalg.inv(A)
    found = conjugate_gradients(lambda p: p @ A, b, lambda r: r @ inverse, 1e-9, 500)
    assert found.num_iterations == 1
    plain = conjugate_gradients(lambda p: p @ A, b, lambda r: r, 1e-9, 500)
    assert plain.num_iterations > 5


def test_conjugate_gradients_say_when_they_stop_too_early():
    A = spd(30, 1e5)
    b = torch.randn(2, 30, dtype=torch.float64)
    found = conjugate_gradients(lambda p: p @ A, b, lambda r: r, 1e-10, 4)
    assert not found.converged
    assert found.num_iterations == 4
    true = (found.x @ A - b).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["regression", "classification", "images", "mlp of tokens"])
def test_the_exact_solve_is_the_dense_solve_with_another_damping_for_each_layer(name):
    case, V = cases.of(name), cases.of(name).vectors(2)
    wanted = oracles.damped_solve(case.G, case.damping_vector, V)
    ekfac = Blockwise(fit_curvature(case.model, case.layers, [case.data], 0).ekfac)
    for solver in (identity(case), ekfac):
        exact = ExactGaussNewton(case.curvature, preconditioner_of(solver, case.layout), 1e-10)
        got = exact.solve(case.layout.blocks(V), case.dampings)
        assert models.relative_error(case.layout.vector(got), wanted) < 1e-7
        for layer in case.layers:
            assert got[layer.name].shape == (2, layer.d_out, layer.d_in)


def test_a_preconditioner_is_factored_once_for_all_iterations():
    case, asked = cases.of("regression"), []

    def preconditioner(dampings):
        asked.append(dict(dampings))
        return lambda r: r

    exact = ExactGaussNewton(case.curvature, preconditioner, 1e-8)
    assert exact.solution(case.vectors(2), case.dampings).num_iterations > 2
    assert asked == [dict(case.dampings)]


def test_a_truncated_exact_solve_is_refused_with_its_residual():
    case = cases.of("regression")
    exact = ExactGaussNewton(
        case.curvature, preconditioner_of(identity(case), case.layout), 1e-11, max_iterations=2
    )
    with pytest.raises(ValueError, match=r"stopped at 2 iterations with a relative residual of"):
        exact.solve(case.layout.blocks(case.vectors(1)), case.dampings)


def test_ekfac_conditions_the_system_better_than_nothing():
    case = cases.tokens(models.mlp(), lengths=(6, 5, 7, 6, 5, 7))
    fitted = fit_curvature(case.model, case.layers, [case.data], 0, draws=4)
    dampings = fitted.dampings(RelativeDamping(0.1))
    steps = [
        ExactGaussNewton(case.curvature, preconditioner_of(of, case.layout), 1e-8).solution(
            case.vectors(2), dampings
        )
        for of in (identity(case), Blockwise(fitted.ekfac))
    ]
    assert steps[1].num_iterations < 0.8 * steps[0].num_iterations


@pytest.mark.parametrize("name", ["regression", "gpt2"])
def test_the_trace_by_random_signs_is_the_trace_within_its_standard_error(name):
    case, probes = cases.of(name), 400
    off_diagonal = case.G - case.G.diagonal().diag()
    error = (2 * (off_diagonal**2).sum() / probes).sqrt().item()  # Hutchinson (1989)
    got = trace(case.curvature, case.layout.current(), probes, seed=0)
    assert abs(got - case.G.trace().item()) < 3 * error
    assert error < 0.1 * case.G.trace().item()


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_top_eigenvalue_is_the_dense_ones(name):
    case = cases.of(name)
    like = case.layout.current()
    got = top_eigenvalue(case.curvature.product, like, 0, tolerance=1e-10, max_iterations=1000)
    assert got == pytest.approx(torch.linalg.eigvalsh(case.G)[-1].item(), rel=1e-6)
