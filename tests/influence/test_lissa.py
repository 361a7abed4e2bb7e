"""LiSSA against the geometric series it is, and against the inverse it tends to."""

import dataclasses
import math

import pytest
import torch

from influence.validation.lissa import LiSSA, Schedule, schedule
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


def full_batch(case: cases.Case, depth: int) -> Schedule:
    return schedule(case.curvature, case.dampings, depth, len(case.examples), seed=0)


@pytest.mark.parametrize("name", ["regression", "classification", "mlp of tokens"])
def test_deep_enough_on_the_full_batch_it_is_the_dense_solve(name):
    case, V = cases.of(name), cases.of(name).vectors(1)
    dampings = {name: 20 * value for name, value in case.dampings.items()}
    plan = schedule(case.curvature, dampings, 1, len(case.examples), seed=0)
    depth = math.ceil(math.log(1e4) / (plan.scale * min(dampings.values())))  # to 1e-4
    plan = dataclasses.replace(plan, depth=depth)
    got = LiSSA(case.curvature, plan, 0).solve(case.layout.blocks(V), dampings)
    wanted = oracles.damped_solve(case.G, 20 * case.damping_vector, V)
    assert models.relative_error(case.layout.vector(got), wanted) < 1e-3


@pytest.mark.parametrize("name", ["regression", "images"])
def test_every_depth_is_the_geometric_series_of_that_many_terms(name):
    case, V = cases.of(name), cases.of(name).vectors(2)
    plan = full_batch(case, 6)
    found = list(LiSSA(case.curvature, plan, 0).iterates(case.layout.vector(case.layout.blocks(V)),
                                                         case.dampings))  # fmt: skip
    assert len(found) == 6
    for depth, got in enumerate(found, start=1):
        for v, answer in zip(V, got, strict=True):
            wanted = oracles.neumann(case.G, case.damping_vector, plan.scale, v, depth)
            assert models.relative_error(answer, wanted) < 1e-12


def test_stopping_early_acts_like_more_damping():
    """For an eigenvalue σ, α Σ (1 − α(σ + λ))ʲ is 1 / (σ + λ + 1/(αJ)) within 30 % for any σ."""
    damping, alpha, depth = 0.01, 0.1, 200
    truncation = Schedule(alpha, depth, 1, 0.0, 0.0, 0.0).truncation
    one = torch.ones(1, dtype=torch.float64)
    differences = []
    for eigenvalue in (0.0, 1e-3, 0.01, 0.1, 1.0):
        G = eigenvalue * torch.ones(1, 1).double()
        got = oracles.neumann(G, damping * one, alpha, one, depth - 1).item()
        differences.append(got * (eigenvalue + damping + truncation) - 1)
    assert max(map(abs, differences)) < 0.30  # the largest is 0.298, at αJ(σ + λ) = 1.79


def test_an_alpha_ten_times_too_large_is_refused_and_named():
    case, V = cases.of("regression"), cases.of("regression").vectors(1)
    top = torch.linalg.eigvalsh(case.G)[-1].item()
    alpha = 10 / top
    plan = dataclasses.replace(full_batch(case, 100), scale=alpha)
    with pytest.raises(ValueError, match=rf"diverges.*α = {alpha:.3g}") as caught:
        LiSSA(case.curvature, plan, 0).solve(case.layout.blocks(V), case.dampings)
    assert "; lower α" in str(caught.value)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("make", [cases.regression, cases.classification])
def test_the_alpha_of_the_schedule_does_not_diverge(make, batch):
    """And with forty steps lands nearer to the inverse than to nothing."""
    for seed in range(2):
        case = make(seed=10 * seed, number=12)
        plan = schedule(case.curvature, case.dampings, 40, batch, seed)
        assert plan.batch == min(batch, 12)
        top, total = torch.linalg.eigvalsh(case.G)[-1], case.G.trace()
        needed = 1 / (top + total / batch + max(case.dampings.values()))
        assert plan.scale < 1.4 * needed  # eight probes know the trace within some 20 %
        V = case.vectors(2)
        got = LiSSA(case.curvature, plan, seed).solve(case.layout.blocks(V), case.dampings)
        wanted = oracles.damped_solve(case.G, case.damping_vector, V)
        assert models.relative_error(case.layout.vector(got), wanted) < 0.95


def test_the_mean_over_seeds_of_a_stochastic_run_is_nearer_than_one_run():
    case, V = cases.of("classification"), cases.of("classification").vectors(1)
    plan = schedule(case.curvature, case.dampings, 60, 3, 0)
    runs = [
        case.layout.vector(
            LiSSA(case.curvature, plan, seed).solve(case.layout.blocks(V), case.dampings)
        )
        for seed in range(5)
    ]
    wanted = oracles.neumann(case.G, case.damping_vector, plan.scale, V[0], 60)
    errors = [models.relative_error(run[0], wanted) for run in runs]
    mean = models.relative_error(torch.stack(runs).mean(0)[0], wanted)
    assert mean < sum(errors) / len(errors)
    assert min(errors) > 0  # the minibatches are not the full batch


def test_one_example_with_far_more_curvature_than_the_rest_does_not_make_it_diverge():
    """A trace that is a mean over examples does not see it, and its α diverges."""
    case, batch = cases.with_an_outlier(), 2
    plan = schedule(case.curvature, case.dampings, 400, batch, 0)
    V = case.layout.blocks(case.vectors(1))
    got = case.layout.vector(LiSSA(case.curvature, plan, 0).solve(V, case.dampings))
    wanted = oracles.damped_solve(case.G, case.damping_vector, case.vectors(1))
    assert models.relative_error(got, wanted) < 1
    by_mean = 1 / (plan.top + plan.trace / batch + max(case.dampings.values()))
    assert plan.scale < by_mean / 2
    careless = dataclasses.replace(plan, scale=5 * by_mean)
    with pytest.raises(ValueError, match=rf"asks for α ≤ {1 / plan.worst:.3g}; lower α"):
        LiSSA(case.curvature, careless, 0).solve(V, case.dampings)


def test_a_batch_larger_than_the_data_is_the_data():
    case = cases.of("regression")
    plans = [schedule(case.curvature, case.dampings, 5, batch, 0) for batch in (9, 100)]
    assert plans[0] == plans[1]
