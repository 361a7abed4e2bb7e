"""The sketch of G: exact from its rank on, a good preconditioner below it."""

import pytest
import torch

from influence.solver import Blockwise, GradientDot
from influence.validation import ggn
from influence.validation.ggn import ExactGaussNewton
from influence.validation.nystrom import Nystrom
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


@pytest.mark.parametrize("name", cases.NAMES)
def test_with_as_many_columns_as_the_rank_it_is_the_dense_damped_inverse(name):
    case, V = cases.of(name), cases.of(name).vectors(3)
    wanted = oracles.damped_solve(case.G, case.damping_vector, V)
    rank = int(torch.linalg.matrix_rank(case.G))
    # A few columns above the rank: with none, the core may be ill-conditioned by chance.
    for columns in (rank + 4, len(case.G), 10 * len(case.G)):
        sketch = Nystrom.of(case.curvature, columns, seed=0)
        assert models.relative_error(sketch.F.T @ sketch.F, case.G) < 1e-7
        got = case.layout.vector(sketch.solve(case.layout.blocks(V), case.dampings))
        assert models.relative_error(got, wanted) < 1e-7
    # Columns beyond the rank cost nothing but time, and bring it to rounding.
    assert models.relative_error(got, wanted) < 1e-9
    exact = ExactGaussNewton(case.curvature, sketch.preconditioner, 1e-7)
    assert exact.solution(V, case.dampings).num_iterations == 1


@pytest.mark.parametrize("name", ["regression", "images", "mlp of tokens"])
def test_with_fewer_columns_it_is_a_positive_definite_inverse_that_saves_iterations(name):
    case = cases.of(name)
    sketch = Nystrom.of(case.curvature, 8, seed=0)
    assert sketch.F.shape == (8, len(case.G))
    dense = sketch.inverse(case.dampings).apply(torch.eye(len(case.G)).double())
    assert (dense - dense.T).abs().max() < 1e-10 * dense.abs().max()
    assert torch.linalg.eigvalsh(dense)[0] > 0
    tail = torch.linalg.eigvalsh(sketch.F.T @ sketch.F)[-8].item()
    assert sketch.tail == pytest.approx(tail, rel=1e-6)
    # The sketch is below G, never above: (Frangella, Tropp and Udell 2023, Lemma 2.1).
    above = torch.linalg.eigvalsh(case.G - sketch.F.T @ sketch.F)
    assert above[0] > -1e-9 * above[-1]
    none = Blockwise({layer.name: GradientDot() for layer in case.layers})
    dampings = {name: 0.2 * value for name, value in case.dampings.items()}
    plain, sketched = (
        ExactGaussNewton(case.curvature, of, 1e-9).solution(case.vectors(1), dampings)
        for of in (ggn.preconditioner_of(none, case.layout), sketch.preconditioner)
    )
    assert sketched.num_iterations < plain.num_iterations


def test_many_dampings_cost_no_further_product(monkeypatch):
    case, V = cases.of("images"), cases.of("images").vectors(3)
    sketch = Nystrom.of(case.curvature, len(case.G), seed=0)

    def refuse(*_: object) -> None:
        raise AssertionError("a product with G")

    monkeypatch.setattr(ggn, "curvature_product", refuse)
    for factor in (0.01, 1.0, 100.0):
        dampings = {name: factor * value for name, value in case.dampings.items()}
        wanted = oracles.damped_solve(case.G, factor * case.damping_vector, V)
        assert models.relative_error(sketch.inverse(dampings).apply(V), wanted) < 1e-7
