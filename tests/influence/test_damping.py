"""Damping: a rule per layer, and no rule that gives nothing."""

import math

import pytest
import torch

from influence.damping import AbsoluteDamping, RelativeDamping

VALUES = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]], dtype=torch.float64)


def test_relative_damping_is_a_ratio_of_the_mean_eigenvalue():
    assert RelativeDamping(0.1).of(VALUES) == pytest.approx(0.2, rel=1e-15)


def test_relative_damping_scales_with_the_eigenvalues():
    assert RelativeDamping(0.1).of(100 * VALUES) == pytest.approx(20, rel=1e-15)


def test_absolute_damping_is_its_value_whatever_the_eigenvalues():
    assert AbsoluteDamping(0.3).of(VALUES) == AbsoluteDamping(0.3).of(100 * VALUES) == 0.3


@pytest.mark.parametrize("rule", [RelativeDamping, AbsoluteDamping])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_damping_that_is_not_positive_and_finite_is_refused(rule, bad):
    with pytest.raises(ValueError, match=str(bad)):
        rule(bad)


@pytest.mark.parametrize("curvature", [0.0, math.nan, math.inf])
def test_relative_damping_without_a_positive_finite_mean_eigenvalue_is_refused(curvature):
    """λ = 0 would divide zero by zero, and λ = ∞ would score everything 0."""
    with pytest.raises(ValueError, match="eigenvalue"):
        RelativeDamping(0.1).of(torch.full((2, 2), curvature))
