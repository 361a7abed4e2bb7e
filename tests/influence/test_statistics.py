"""Agreement: correlations by their definitions, and an interval over queries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.statistics import Agreement, pearson, spearman
from tests import oracles

values = st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=12)


@given(st.data(), values)
def test_correlations_are_their_definitions_with_ties_sharing_their_mean_rank(data, x):
    y = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=len(x), max_size=len(x)))
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(pearson(a, b))
        assert math.isnan(spearman(a, b))
    else:
        assert pearson(a, b) == pytest.approx(oracles.pearson(x, y), abs=1e-12)
        assert spearman(a, b) == pytest.approx(oracles.spearman(x, y), abs=1e-12)


def test_a_monotone_relation_has_rank_correlation_one():
    x = torch.linspace(-2, 3, 20, dtype=torch.float64)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert pearson(x, x.exp()) < 0.95
    assert pearson(x, -2 * x + 1) == pytest.approx(-1)


def test_a_small_spread_on_a_large_mean_is_correlated_without_loss():
    x = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    y = torch.tensor([1.0, 3.0, 2.0, 5.0], dtype=torch.float64)
    assert pearson(1e6 + x, 1e6 + y) == pytest.approx(pearson(x, y), rel=1e-8)


def noisy(q: int, n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(q, n, dtype=torch.float64)
    return x, x + torch.randn(q, 1, dtype=torch.float64).abs() * torch.randn(q, n).double()


def test_agreement_is_the_mean_over_queries_of_the_correlations():
    x, y = noisy(7)
    agreement = Agreement.of(x, y, seed=0)
    rows = [(a.tolist(), b.tolist()) for a, b in zip(x, y, strict=True)]
    assert agreement.num_queries == 7
    assert agreement.pearson == pytest.approx(sum(oracles.pearson(*row) for row in rows) / 7)
    assert agreement.spearman == pytest.approx(sum(oracles.spearman(*row) for row in rows) / 7)
    assert agreement.low <= agreement.pearson <= agreement.high


def test_the_interval_is_that_of_the_mean_over_resampled_queries():
    """For many queries it tends to ±1.96 standard errors of the mean; 10 % for 2000 resamples."""
    x, y = noisy(200)
    agreement = Agreement.of(x, y, seed=0)
    rows = torch.tensor([pearson(a, b) for a, b in zip(x, y, strict=True)])
    half_width = 1.96 * (rows.std() / math.sqrt(200)).item()
    assert agreement.high - agreement.pearson == pytest.approx(half_width, rel=0.1)
    assert agreement.pearson - agreement.low == pytest.approx(half_width, rel=0.1)


def test_the_interval_depends_on_the_seed_alone():
    x, y = noisy(7)
    assert Agreement.of(x, y, seed=0) == Agreement.of(x, y, seed=0)
    assert Agreement.of(x, y, seed=0) != Agreement.of(x, y, seed=1)
