"""The damped solve against the dense one; K-FAC is the same block with other eigenvalues."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.damping import AbsoluteDamping, RelativeDamping
from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock, kfac_eigenvalues
from influence.solver import GradientDot
from tests import oracles
from tests.influence import models

DAMPINGS = [RelativeDamping(0.1), RelativeDamping(1e-6), AbsoluteDamping(0.3)]


def block(seed: int = 0, d_out: int = 3, d_in: int = 4) -> EKFACBlock:
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.rand(d_out, d_in, generator=generator, dtype=torch.float64) ** 4
    basis = EigenBasis(models.orthogonal(seed + 1, d_in), models.orthogonal(seed + 2, d_out))
    return EKFACBlock(basis, eigenvalues)


def dense(of: EKFACBlock) -> torch.Tensor:
    return oracles.ekfac(of.basis.Q_A, of.basis.Q_S, of.eigenvalues)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_solve_is_the_dense_solve(damping):
    of, V = block(), torch.randn(3, 4, dtype=torch.float64)
    wanted = oracles.damped_solve(dense(of), V, damping.of(of.eigenvalues))
    torch.testing.assert_close(of.solve(V, damping), wanted, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_solve_is_the_dense_solve_for_any_shape(d_out, d_in, seed):
    of, V = block(seed, d_out, d_in), torch.randn(d_out, d_in, dtype=torch.float64)
    damping = RelativeDamping(0.1)
    wanted = oracles.damped_solve(dense(of), V, 0.1 * of.eigenvalues.mean().item())
    assert models.relative_error(of.solve(V, damping), wanted) < 1e-9


def test_the_solve_undoes_the_damped_matrix():
    """Manufactured: V = (G + λ)X has to give X back."""
    of, X = block(), torch.randn(3, 4, dtype=torch.float64)
    G = dense(of) + 0.3 * torch.eye(12, dtype=torch.float64)
    V = oracles.unvec(G @ oracles.vec(X), 3)
    torch.testing.assert_close(of.solve(V, AbsoluteDamping(0.3)), X)


def test_the_solve_takes_many_matrices_at_once():
    of, V = block(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    solved = of.solve(V, DAMPINGS[0])
    assert solved.shape == V.shape
    torch.testing.assert_close(solved[1, 4], of.solve(V[1, 4], DAMPINGS[0]))


def test_solving_in_the_eigenbasis_is_solving_outside_it():
    of, V = block(), torch.randn(2, 3, 4, dtype=torch.float64)
    inside = of.solve_rotated(of.basis.rotate(V), DAMPINGS[0])
    torch.testing.assert_close(of.basis.unrotate(inside), of.solve(V, DAMPINGS[0]))


def test_solving_changes_no_eigenvalue():
    """LogIX adds λ to the stored tensor at each call."""
    of, V = block(), torch.randn(3, 4, dtype=torch.float64)
    before, first = of.eigenvalues.clone(), of.solve(V, DAMPINGS[2])
    assert torch.equal(of.solve(V, DAMPINGS[2]), first)
    assert torch.equal(of.eigenvalues, before)


def test_a_huge_damping_divides_by_it():
    of, V = block(), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(1e12 * of.solve(V, AbsoluteDamping(1e12)), V)


def test_kfac_eigenvalues_are_those_of_A_kronecker_S_times_the_tokens_of_a_sequence():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    A, S = eigendecompose(x.T @ x, "A"), eigendecompose(y.T @ y, "S")
    values = kfac_eigenvalues(A, S, 7.5)
    assert values.shape == (3, 4)
    got = oracles.ekfac(A.vectors, S.vectors, values)
    torch.testing.assert_close(got, 7.5 * torch.kron(x.T @ x, y.T @ y))


def test_the_gradient_dot_product_solves_with_the_identity():
    V = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(GradientDot().solve(V, DAMPINGS[0]), V)
