"""The eigenbasis: columns, and rotation as the dense Kronecker product does it."""

import pytest
import torch

from influence.capture import LayerIO
from influence.eigenbasis import EigenBasis, RotatedInputs, eigendecompose
from influence.lowrank import LowRank
from tests import oracles
from tests.influence import models


def basis(d_in: int = 4, d_out: int = 3) -> EigenBasis:
    return EigenBasis(models.orthogonal(1, d_in), models.orthogonal(2, d_out))


def test_eigenvectors_are_columns_in_ascending_order_of_eigenvalue():
    Q, values = models.orthogonal(0, 5), torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0]).double()
    matrix = Q @ values.diag() @ Q.T
    eigen = eigendecompose(matrix, "A of some layer")
    torch.testing.assert_close(eigen.values, values)
    for k in range(5):
        torch.testing.assert_close(matrix @ eigen.vectors[:, k], values[k] * eigen.vectors[:, k])
        torch.testing.assert_close(Q[:, k].dot(eigen.vectors[:, k]).abs().item(), 1.0)


def test_eigenvectors_are_orthonormal_though_the_matrix_is_singular():
    x = torch.randn(2, 6, dtype=torch.float64)
    vectors = eigendecompose(x.T @ x, "S").vectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64))


def test_a_float32_matrix_is_decomposed_in_float64():
    x = torch.randn(9, 6)
    eigen = eigendecompose(x.T @ x, "S")
    assert eigen.values.dtype == eigen.vectors.dtype == torch.float64
    error = eigen.vectors @ eigen.values.diag() @ eigen.vectors.T - (x.T @ x).double()
    assert error.abs().max() < 1e-6  # the rounding of x, made symmetric; eigh in float32 has 1e-5


def test_a_matrix_that_is_not_quite_symmetric_is_made_so():
    x = torch.randn(6, 6, dtype=torch.float64)
    eigen = eigendecompose(x, "S")
    both = eigen.vectors @ eigen.values.diag() @ eigen.vectors.T
    torch.testing.assert_close(both, (x + x.T) / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused_by_name(bad):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = bad
    with pytest.raises(ValueError, match=r"block\.3\.fc1"):
        eigendecompose(matrix, "block.3.fc1")


def test_rotation_is_the_dense_kronecker_product_and_unrotation_its_transpose():
    frame, V = basis(), torch.randn(3, 4, dtype=torch.float64)
    Q = torch.kron(frame.Q_A, frame.Q_S)
    rotated, unrotated = (
        oracles.unvec(Q.T @ oracles.vec(V), 3),
        oracles.unvec(Q @ oracles.vec(V), 3),
    )
    torch.testing.assert_close(frame.rotate(V), rotated)
    torch.testing.assert_close(frame.unrotate(V), unrotated)
    assert models.relative_error(rotated, unrotated) > 0.5  # rows for columns would be seen


def test_unrotation_undoes_rotation_for_any_number_of_leading_axes():
    frame, V = basis(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(frame.unrotate(frame.rotate(V)), V)
    torch.testing.assert_close(frame.rotate(V)[1, 2], frame.rotate(V[1, 2]))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("t", "i", "o"),
    [(1, 5, 6), (4, 9, 3), (4, 3, 9), (40, 3, 4), (3, 16, 5), (9, 16, 5)],  # 17 columns: in parts
)
def test_rotating_a_sequence_gradient_is_the_same_in_every_order(t, i, o, has_bias):
    """Each side rotates the tokens of a short sequence, and the sum of a long one."""
    io = models.random_io(0, t=t, i=i, o=o, has_bias=has_bias)
    frame = basis(i + has_bias, o)
    Q = torch.kron(frame.Q_A, frame.Q_S)
    for n, gradient in enumerate(io.gradient()):
        wanted = oracles.unvec(Q.T @ oracles.vec(gradient), o)
        torch.testing.assert_close(
            frame.rotate_gradient(io)[n], wanted, rtol=1e-10, atol=1e-11
        )  # sums of 40 terms


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("t", [1, 2, 6])
def test_squares_of_rotated_gradients_are_summed_over_sequences_and_not_over_tokens(t, has_bias):
    """Of a single position the square factors, and no gradient is formed."""
    io = models.random_io(0, n=5, t=t, i=3, o=4, has_bias=has_bias)
    frame = basis(3 + has_bias, 4)
    wanted = torch.stack([frame.rotate(gradient) for gradient in io.gradient()]).square().sum(0)
    sums = torch.ones_like(wanted)
    frame.add_rotated_squares(sums, io)
    torch.testing.assert_close(sums, wanted + 1)


def test_inputs_rotated_for_a_layer_serve_the_next_ones_with_the_same_input_and_basis(monkeypatch):
    """Also one that would rotate its gradient instead; never another input, nor another basis."""
    wide, other = models.random_io(0, t=3, i=4, o=5), models.random_io(1, t=3, i=4, o=5)
    narrow = LayerIO(wide.a, models.random_io(2, t=3, i=4, o=2).ds, has_bias=True)
    first, again = basis(5, 5), EigenBasis(models.orthogonal(1, 5), models.orthogonal(3, 5))
    second = EigenBasis(first.Q_A, models.orthogonal(4, 2))
    turned = EigenBasis(models.orthogonal(5, 5), first.Q_S)
    assert not second.rotates_inputs_first(3)
    rotated = []

    def counting(basis, io, rotate=EigenBasis._rotated_inputs):
        rotated.append(io)
        return rotate(basis, io)

    steps = [(first, wide), (second, narrow), (first, other), (turned, other), (again, other)]
    wanted = [frame.rotate(io.gradient()) for frame, io in steps]
    monkeypatch.setattr(EigenBasis, "_rotated_inputs", counting)
    shared = RotatedInputs()
    for (frame, io), each in zip(steps, wanted, strict=True):
        torch.testing.assert_close(frame.rotate_gradient(io, shared), each)
    assert [any(io is each for each in (wide, other)) for io in rotated] == [True] * 4
    monkeypatch.undo()


def test_all_four_orders_are_among_the_cases_above():
    shapes = [(1, 5, 6), (4, 9, 3), (4, 3, 9), (40, 3, 4)]
    frames = [(basis(i, o), t) for t, i, o in shapes]
    orders = {(b.rotates_inputs_first(t), b.rotates_outputs_first(t)) for b, t in frames}
    assert orders == {(True, True), (True, False), (False, True), (False, False)}


def test_low_rank_matrices_are_unrotated_side_by_side():
    frame = basis()
    rotated = LowRank.of(torch.randn(2, 3, 4, dtype=torch.float64), 2)
    got = rotated.mapped(frame.unrotate_outputs, frame.unrotate_inputs)
    torch.testing.assert_close(got.dense(), frame.unrotate(rotated.dense()))


def test_a_basis_takes_the_dtype_of_a_pass():
    frame = basis().to(torch.float32, "cpu")
    assert frame.Q_A.dtype == frame.Q_S.dtype == torch.float32
    assert (frame.d_in, frame.d_out) == (4, 3)
