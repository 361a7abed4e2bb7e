"""Low-rank query matrices: exact at full rank, best below."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.lowrank import LowRank
from tests.influence import models

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


def matrices(q: int, o: int, i: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(q, o, i, generator=generator, dtype=torch.float64)


@given(SHAPES, st.integers(0, 9))
def test_full_rank_is_exact(shape, seed):
    V = matrices(*shape, seed)
    for rank in (None, min(shape[1:]), max(shape[1:]), 1000):
        low = LowRank.of(V, rank)
        assert low.rank == min(shape[1:])
        assert models.relative_error(low.dense(), V) < 1e-12


@given(SHAPES, st.integers(1, 7), st.integers(0, 9))
def test_no_matrix_of_that_rank_is_nearer(shape, rank, seed):
    """Eckart and Young: the squared distance is the sum of the squared singular values left out."""
    V = matrices(*shape, seed)
    low = LowRank.of(V, rank)
    left_out = torch.linalg.svdvals(V)[:, rank:].square().sum(1)
    distance = (low.dense() - V).square().sum((1, 2))
    torch.testing.assert_close(distance, left_out, rtol=1e-9, atol=1e-12)
    assert low.rank == min(rank, *shape[1:])
    assert (torch.linalg.matrix_rank(low.dense()) <= rank).all()


def test_the_error_falls_as_the_rank_grows():
    V = matrices(3, 6, 8)
    errors = [(LowRank.of(V, r).dense() - V).norm().item() for r in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] > 0.1
    assert errors[5] < 1e-12


def test_a_matrix_of_low_rank_is_exact_at_its_rank():
    V = matrices(2, 6, 2) @ matrices(2, 2, 8, 1)
    torch.testing.assert_close(LowRank.of(V, 2).dense(), V)


def test_dense_is_left_times_right():
    low = LowRank(matrices(2, 3, 2), matrices(2, 2, 5, 1))
    wanted = torch.stack([low.left[q] @ low.right[q] for q in range(2)])
    torch.testing.assert_close(low.dense(), wanted)
    assert (low.rank, low.num_queries) == (2, 2)


def test_every_query_has_its_own_matrix():
    V = matrices(4, 3, 5)
    low = LowRank.of(V, 1)
    torch.testing.assert_close(low.dense()[2:3], LowRank.of(V[2:3], 1).dense())
    torch.testing.assert_close(low.select([3, 1]).dense(), low.dense()[[3, 1]])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=str(rank)):
        LowRank.of(matrices(1, 2, 2), rank)


def test_a_dtype_is_changed_on_both_sides():
    low = LowRank.of(matrices(1, 2, 3), None).to(torch.float32, "cpu")
    assert low.left.dtype == low.right.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 300, 257), (1, 250, 400)])
def test_large_matrices_are_truncated_as_well_as_by_the_whole_decomposition(shape):
    """Singular values that fall slowly, as k^-0.7 of a preconditioned gradient do."""
    q, o, i = shape
    n = min(o, i)
    U = torch.stack([models.orthogonal(k, o) for k in range(q)])[:, :, :n]
    W = torch.stack([models.orthogonal(9 + k, i) for k in range(q)])[:, :, :n]
    s = torch.arange(1, n + 1).double() ** -0.7
    V = (U * s) @ W.mT
    rank = 32
    low = LowRank.of(V, rank)
    assert low.rank == rank
    best = s[rank:].square().sum()
    left_out = (low.dense() - V).square().sum((1, 2))
    assert (left_out >= best * (1 - 1e-9)).all()
    assert (left_out < best * 1.002).all()
    assert torch.equal(LowRank.of(V, rank).left, low.left)  # nothing is drawn anew


def test_large_matrices_are_truncated_without_decomposing_them_whole(monkeypatch):
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda V, **k: seen.append(V.shape) or svd(V, **k))
    LowRank.of(matrices(1, 300, 260), 8)
    assert max(min(shape[-2:]) for shape in seen) < 100
