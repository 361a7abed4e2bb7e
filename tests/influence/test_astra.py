"""ASTRA: from EK-FAC's answer to the exact one."""

import dataclasses

import pytest

from influence.solver import Blockwise
from influence.validation.astra import ASTRA
from influence.validation.estimators import Curvature, fit_curvature
from influence.validation.nystrom import Nystrom
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


def fitted(case: cases.Case) -> Curvature:
    return fit_curvature(case.model, case.layers, [case.data], 0, draws=4)


def ekfac(case: cases.Case) -> Blockwise:
    return Blockwise(fitted(case).ekfac)


def answer(case: cases.Case, astra: ASTRA, number: int = 2):
    V = case.layout.blocks(case.vectors(number))
    return case.layout.vector(astra.solve(V, case.dampings))


def exact(case: cases.Case, number: int = 2):
    return oracles.damped_solve(case.G, case.damping_vector, case.vectors(number))


def test_without_iterations_it_is_the_preconditioners_answer():
    case = cases.of("regression")
    preconditioner = ekfac(case)
    got = answer(case, ASTRA(case.curvature, preconditioner, 0, 100, 0))
    V = case.layout.blocks(case.vectors(2))
    wanted = case.layout.vector(preconditioner.solve(V, case.dampings))
    assert models.relative_error(got, wanted) < 1e-12
    assert models.relative_error(got, exact(case)) > 0.05  # and EK-FAC is not exact here


@pytest.mark.parametrize("name", ["regression", "classification", "mlp of tokens"])
def test_many_iterations_on_the_full_batch_are_the_dense_solve(name):
    case = cases.of(name)
    got = answer(case, ASTRA(case.curvature, ekfac(case), 120, 100, 0))
    assert models.relative_error(got, exact(case)) < 1e-3


def test_the_exact_inverse_as_preconditioner_stays_where_it_starts():
    case = cases.of("images")
    inverse = Nystrom.of(case.curvature, len(case.G), 0)
    for iterations in (1, 4):
        got = answer(case, ASTRA(case.curvature, inverse, iterations, 100, 0))
        assert models.relative_error(got, exact(case)) < 1e-7


def test_minibatches_bring_it_nearer_than_ekfac_and_more_of_them_nearer_still():
    """By steps of at most 1: a preconditioner that is too small does not make it diverge."""
    case = cases.classification(number=40)
    preconditioner, wanted = ekfac(case), exact(case)
    start, some, more = (
        models.relative_error(
            answer(case, ASTRA(case.curvature, preconditioner, number, 20, 0)), wanted
        )
        for number in (0, 30, 120)
    )
    assert some < 0.7 * start
    assert more < some


def test_a_preconditioner_that_is_far_too_large_is_scaled_down():
    case = cases.of("classification")
    blocks = {
        name: dataclasses.replace(block, eigenvalues=block.eigenvalues / 10)
        for name, block in fitted(case).ekfac.items()
    }
    got = answer(case, ASTRA(case.curvature, Blockwise(blocks), 200, 100, 0))
    assert models.relative_error(got, exact(case)) < 1e-2


def test_one_example_with_far_more_curvature_than_the_rest_does_not_make_it_diverge():
    case = cases.with_an_outlier(number=24)
    preconditioner, wanted = ekfac(case), exact(case)
    got = answer(case, ASTRA(case.curvature, preconditioner, 200, 4, 0))
    assert models.relative_error(got, wanted) < models.relative_error(
        answer(case, ASTRA(case.curvature, preconditioner, 0, 4, 0)), wanted
    )


@pytest.mark.parametrize("alpha", [3.0, 1e6])
def test_a_divergence_is_refused_also_where_it_overflows(alpha, monkeypatch):
    case = cases.of("classification")
    monkeypatch.setattr(ASTRA, "step_size", lambda *_: alpha)
    with pytest.raises(ValueError, match=r"ASTRA diverges: after 100 steps.*raise the batch"):
        answer(case, ASTRA(case.curvature, ekfac(case), 100, 3, 0))
