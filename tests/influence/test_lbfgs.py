"""L-BFGS on problems side by side, smooth and with kinks."""

import pytest
import torch
from torch import Tensor

from influence.validation import lbfgs
from influence.validation.lbfgs import Minimum, minimise


def run(values_at, start: Tensor, tolerance: float, most: int) -> Minimum:
    return minimise(
        values_at, lambda r: r, start, torch.full((len(start),), tolerance).double(), most
    )


def test_problems_side_by_side_are_solved_as_if_each_were_alone():
    """Minima of bowls that flatten outwards: steps from afar overshoot, each by another factor."""
    centres = torch.tensor([[0.3, -1.0, 2.0], [4.0, 0.0, -2.0], [0.0, 0.0, 0.0]]).double()
    scales = torch.tensor([[1.0, 3.0, 0.5], [20.0, 1.0, 2.0], [1.0, 1.0, 1.0]]).double()

    def values_at(x: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        gap, scale = x - centres[problems], scales[problems]
        root = (1 + gap**2).sqrt()
        return (scale * (root - 1)).sum(dim=1), scale * gap / root

    start = torch.zeros(3, 3).double()
    together = run(values_at, start, 1e-9, 300)
    assert (together.norms <= 1e-9).all()
    torch.testing.assert_close(together.points, centres, rtol=0, atol=1e-7)
    for k in range(3):
        alone = run(lambda x, problems, k=k: values_at(x, problems + k), start[:1], 1e-9, 300)
        torch.testing.assert_close(alone.points[0], together.points[k], rtol=0, atol=1e-12)
        assert alone.evaluations[0] == together.evaluations[k]


def test_the_preconditioner_is_applied_once_at_each_point_and_nowhere_else():
    """It may cost more than a gradient."""
    A = torch.diag(torch.logspace(0, 3, 12)).double()
    applied = []

    def precondition(r: Tensor) -> Tensor:
        applied.append(len(r))
        return r

    found = minimise(
        lambda x, _: ((x @ A * x).sum(dim=1) / 2, x @ A),
        precondition, torch.ones(1, 12).double(), torch.tensor([1e-6]).double(), 200,
    )  # fmt: skip
    assert found.norms[0] <= 1e-6
    assert len(applied) <= found.evaluations[0]


def with_kinks(x: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ d (x − c)² + Σ |x|: the minimum is soft(c, 1/d), half of it on kinks."""
    weight = torch.tensor([1.0, 2.0, 5.0, 1.0]).double()
    centre = torch.tensor([[0.5, 3.0, -0.1, -4.0], [5.0, -0.2, 1.0, 0.9]]).double()[problems]
    value = (weight * (x - centre) ** 2).sum(dim=1) / 2 + x.abs().sum(dim=1)
    return value, weight * (x - centre) + torch.where(x >= 0, 1.0, -1.0)


KINKED = torch.tensor([[0.0, 2.5, 0.0, -3.0], [4.0, 0.0, 0.8, 0.0]]).double()


def test_a_minimum_on_kinks_is_reached_and_ends_the_problem():
    """There the gradient is never small, and no evaluation more would help."""
    start = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-2.0, 1.5, -1.0, 2.0]]).double()
    found = run(with_kinks, start, 1e-9, 5000)
    best = with_kinks(KINKED, torch.arange(2))[0]
    values = with_kinks(found.points, torch.arange(2))[0]
    assert ((values - best) < 2e-3 * best).all()
    assert (found.norms > 0.1).all()
    assert (found.evaluations < 1000).all()


def test_without_the_weak_conditions_it_ends_further_up(monkeypatch):
    monkeypatch.setattr(lbfgs, "DECREASE", float("inf"))  # no step is taken for going down
    start = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-2.0, 1.5, -1.0, 2.0]]).double()
    found = run(with_kinks, start, 1e-9, 5000)
    best = with_kinks(KINKED, torch.arange(2))[0]
    assert ((with_kinks(found.points, torch.arange(2))[0] - best) > 2e-3 * best).all()


@pytest.mark.parametrize("most", [1, 2, 7])
def test_no_problem_takes_more_evaluations_than_allowed(most):
    calls = []

    def values_at(x: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        calls.extend(problems.tolist())
        return with_kinks(x, problems)

    found = run(values_at, torch.ones(2, 4).double(), 0.0, most)
    assert found.evaluations.tolist() == [calls.count(0), calls.count(1)]
    assert (found.evaluations <= most).all()


def test_a_preconditioner_of_the_wrong_size_is_rescaled():
    """Far too large, every step of every iteration would have to be halved many times anew."""
    scales = torch.tensor([[1.0, 3.0, 0.5, 7.0]]).double()

    def values_at(x: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return (scales * x**2).sum(dim=1) / 2, scales * x

    start, tolerance = torch.ones(1, 4).double(), torch.full((1,), 1e-9).double()
    counts = [
        minimise(values_at, lambda r, by=by: by * r, start, tolerance, 1000).evaluations.item()
        for by in (1.0, 1e3)
    ]
    assert counts[1] <= counts[0] + 14  # the first step, and what its halvings leave unknown
