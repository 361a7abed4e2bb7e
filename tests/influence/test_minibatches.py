"""Minibatches, and the largest eigenvalue among them, against dense matrices."""

import pytest
import torch

from influence.validation.minibatches import minibatches, worst_eigenvalue
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles


def test_minibatches_give_every_example_once_an_epoch_in_an_order_of_the_seed():
    stream = minibatches(7, 3, seed=0)
    epochs = [torch.cat([next(stream), next(stream)]).tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert torch.equal(next(minibatches(7, 3, 1)), next(minibatches(7, 3, 1)))
    assert not torch.equal(next(minibatches(50, 9, 1)), next(minibatches(50, 9, 2)))
    assert sorted(next(minibatches(4, 10, 0)).tolist()) == [0, 1, 2, 3]


def found(case: cases.Case, batch: int, seed: int = 0) -> float:
    curvature = case.curvature
    like = case.layout.current()
    return worst_eigenvalue(curvature.product, like, curvature.num_examples, batch, seed)


@pytest.mark.parametrize("batch", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("make", [cases.regression, cases.classification, cases.with_an_outlier])
def test_it_is_the_largest_of_one_epoch_and_none_is_smaller_than_a_batch(make, batch):
    case = make()
    seen, wanted = [], 0.0

    def product(x, examples):
        nonlocal wanted
        seen.append(examples)
        assert len(examples) == min(batch, len(case.examples))
        some = [case.examples[place] for place in examples.tolist()]
        G = oracles.gauss_newton(some, case.modules)
        wanted = max(wanted, torch.linalg.eigvalsh(G)[-1].item())
        return x @ G

    like, number = case.layout.current(), len(case.examples)
    got = worst_eigenvalue(product, like, number, batch, 0)
    assert 0.9 * wanted < got < 1.0001 * wanted
    assert set(torch.cat(seen).tolist()) == set(range(number))
    assert got == pytest.approx(found(case, batch), rel=1e-6)


def test_the_whole_data_is_one_minibatch():
    case = cases.classification()
    assert found(case, 9) == pytest.approx(torch.linalg.eigvalsh(case.G)[-1].item(), rel=0.05)
