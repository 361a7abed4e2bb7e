"""What the estimators make of one fit: EK-FAC, K-FAC, the diagonal, and cut-up factors."""

import pytest
import torch

from influence.damping import RelativeDamping
from influence.eigenbasis import eigendecompose
from influence.factors import fit_factors
from influence.objectives import forward, sample_labels
from influence.solver import Blockwise, Solver
from influence.validation.estimators import (
    LABELS_APART,
    eigendecompose_blocks,
    fit_curvature,
    fit_diagonal,
    gradient_dot,
)
from tests import oracles as matrices
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles

DRAWS = 32


def dense_basis(block) -> torch.Tensor:
    """Q over the rows of (W b) in turn: row-major, so S's eigenvectors stand in front."""
    return torch.kron(block.basis.Q_S, block.basis.Q_A)


def dense_block(case: cases.Case, k: int) -> torch.Tensor:
    """The block of G of one layer."""
    return oracles.gauss_newton(case.examples, case.modules[k : k + 1])


@pytest.mark.parametrize("name", ["regression", "classification", "images"])
def test_the_eigenvalues_tend_to_the_diagonal_of_the_rotated_dense_matrix(name):
    """Λ = diag(QᵀGQ). The bounds are two standard errors of 32 draws of 9 or 6 examples; the
    last draw alone, or the same labels in every draw, are beyond them."""
    case = cases.of(name)
    fitted = fit_curvature(case.model, case.layers, [case.data], 0, draws=DRAWS)
    for k, layer in enumerate(case.layers):
        block = fitted.ekfac[layer.name]
        Q = dense_basis(block)
        wanted = (Q.T @ dense_block(case, k) @ Q).diagonal()
        error = (block.eigenvalues.flatten() - wanted).norm() / wanted.norm()
        assert error < 0.3
        assert block.eigenvalues.sum().item() == pytest.approx(wanted.sum().item(), rel=0.25)


def test_every_draw_of_the_spectrum_has_labels_of_its_own_and_counts_once():
    case, draws, seed = cases.of("classification"), 3, 5
    fitted = fit_curvature(case.model, case.layers, case.data.split(4), seed, draws=draws)
    seeds = [seed + LABELS_APART * draw for draw in range(2 * draws)]
    with torch.no_grad():
        outputs = forward(case.model, case.data)
    labels = {each: [[y] for y in sample_labels(outputs, case.data, each)] for each in seeds}
    for layer in case.layers:
        block, total = fitted.ekfac[layer.name], 0
        pairs = [
            oracles.kronecker_factors(layer.module, case.examples, labels[each])
            for each in seeds[:draws]
        ]
        A, S = (sum(parts) / draws for parts in zip(*pairs, strict=True))
        for matrix, eigen, Q in zip(
            (A, S), fitted.eigens[layer.name], (block.basis.Q_A, block.basis.Q_S), strict=True
        ):
            torch.testing.assert_close(Q @ eigen.values.diag() @ Q.T, matrix, rtol=1e-9, atol=1e-12)
        for each in seeds[draws:]:
            for example, drawn in zip(case.examples, labels[each], strict=True):
                g = oracles.gradient(oracles.example_loss(example, drawn), [layer.module])
                total = total + (dense_basis(block).T @ g) ** 2
        wanted = total / (draws * len(case.examples))
        torch.testing.assert_close(block.eigenvalues.flatten(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["regression", "images", "mlp of tokens"])
def test_kfac_is_positions_times_a_kron_s(name):
    """A and S are per position, G is per example: T counts the positions that have a loss."""
    case, V = cases.of(name), cases.of(name).vectors(2)
    fitted = fit_curvature(case.model, case.layers, [case.data], 1, draws=2)
    factors = [
        fit_factors(case.model, case.layers, [case.data], seed) for seed in (1, 1 + LABELS_APART)
    ]
    factors = factors[0] + factors[1]
    positions = {
        "regression": [1, 1],
        "images": [3 * 3, 2 * 1, 1],  # outputs of the two convolutions, and the head
        "mlp of tokens": [sum(len(e.targets) for e in case.examples) / 4] * 3,
    }[name]
    got = Blockwise(fitted.kfac()).solve(case.layout.blocks(V), case.dampings)
    for layer, T in zip(case.layers, positions, strict=True):
        assert fitted.positions[layer.name] == pytest.approx(T)
        pair = factors.of(layer)
        G = T * torch.kron(pair.A.value, pair.S.value)
        for q, block in enumerate(case.layout.blocks(V)[layer.name]):
            wanted = matrices.damped_solve(G, block, case.dampings[layer.name])
            assert models.relative_error(got[layer.name][q], wanted) < 1e-9


def test_the_dampings_come_from_the_corrected_eigenvalues():
    case = cases.of("images")
    fitted = fit_curvature(case.model, case.layers, [case.data], 0)
    for name, damping in fitted.dampings(RelativeDamping(0.1)).items():
        mean = fitted.ekfac[name].eigenvalues.mean().item()
        assert damping == pytest.approx(0.1 * mean, rel=1e-12)
        assert abs(fitted.kfac()[name].eigenvalues.mean().item() / mean - 1) > 1e-3


def test_one_block_is_the_plain_fit_and_more_cut_the_eigenbasis():
    case = cases.of("classification")
    plain, one, two = (
        fit_curvature(case.model, case.layers, [case.data], 0, 1, *blocks)
        for blocks in ((), (1,), (2,))
    )
    for name, block in plain.ekfac.items():
        assert torch.equal(one.ekfac[name].eigenvalues, block.eigenvalues)
        assert torch.equal(one.ekfac[name].basis.Q_A, block.basis.Q_A)
        for Q in (two.ekfac[name].basis.Q_A, two.ekfac[name].basis.Q_S):
            half = (len(Q) + 1) // 2
            assert not Q[:half, half:].any()
            assert not Q[half:, :half].any()
            assert (Q.T @ Q - torch.eye(len(Q))).abs().max() < 1e-12
        # Λ is fitted anew in the cut basis; a rotation keeps its sum.
        assert not torch.equal(two.ekfac[name].eigenvalues, block.eigenvalues)
        assert two.ekfac[name].eigenvalues.sum().item() == pytest.approx(
            block.eigenvalues.sum().item(), rel=1e-9
        )


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_the_eigenbasis_of_blocks_diagonalises_the_matrix_with_the_rest_set_to_zero(blocks):
    matrix = torch.randn(7, 7).double()
    matrix = matrix @ matrix.T
    found = eigendecompose_blocks(matrix, blocks, "A")
    kept = torch.zeros(7, 7).double()
    for rows in torch.arange(7).tensor_split(blocks):
        kept[rows[:, None], rows] = matrix[rows[:, None], rows]
    got = found.vectors @ found.values.diag() @ found.vectors.T
    torch.testing.assert_close(got, kept, rtol=1e-10, atol=1e-10)
    if blocks == 1:
        assert torch.equal(found.values, eigendecompose(matrix, "A").values)


def test_more_blocks_than_rows_are_its_rows_and_none_is_refused():
    matrix = torch.arange(49.0).reshape(7, 7).double()
    matrix = matrix @ matrix.T
    found = eigendecompose_blocks(matrix, 8, "A")
    assert torch.equal(found.values, matrix.diagonal())
    assert torch.equal(found.vectors.abs(), torch.eye(7).double())
    with pytest.raises(ValueError, match="0 blocks; give 1 or more"):
        eigendecompose_blocks(matrix, 0, "A")


@pytest.mark.parametrize("name", ["regression", "images"])
def test_the_diagonal_tends_to_the_diagonal_of_the_dense_matrix(name):
    case = cases.of(name)
    diagonal = fit_diagonal(case.model, case.layers, [case.data], 0, draws=DRAWS)
    for k, layer in enumerate(case.layers):
        wanted = dense_block(case, k).diagonal()
        got = diagonal[layer.name]
        assert (got.eigenvalues.flatten() - wanted).norm() / wanted.norm() < 0.25
        V = torch.randn(layer.d_out, layer.d_in).double()
        solved = Blockwise({layer.name: got}).solve({layer.name: V[None]}, {layer.name: 0.3})
        torch.testing.assert_close(solved[layer.name][0], V / (got.eigenvalues + 0.3))


def test_the_gradient_dot_product_leaves_every_vector_as_it_is():
    case, V = cases.of("images"), cases.of("images").vectors(2)
    solver = gradient_dot(case.layers)
    assert isinstance(solver, Solver)
    got = case.layout.vector(solver.solve(case.layout.blocks(V), case.dampings))
    assert torch.equal(got, V)
