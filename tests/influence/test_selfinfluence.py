"""Self-influence against the dense inverse, its sign, and what it refuses."""

import pytest
import torch

from influence.damping import RelativeDamping
from influence.ekfac import EKFACBlock
from influence.scores import influence
from influence.selfinfluence import stream_self
from tests import oracles
from tests.influence import models
from tests.influence.test_spectrum import any_bases

DAMPING = RelativeDamping(0.1)


def any_solvers(layers) -> dict[str, EKFACBlock]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: EKFACBlock(
            basis, torch.rand(basis.d_out, basis.d_in, generator=generator, dtype=torch.float64)
        )
        for name, basis in any_bases(layers).items()
    }


@pytest.mark.parametrize("case", models.CASES)
def test_the_form_is_the_gradient_through_the_dense_inverse(case):
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    solvers = any_solvers(layers)
    ((ids, found),) = stream_self(model, layers, solvers, DAMPING, [models.batch(sequences)])
    assert ids.tolist() == [100, 101, 102, 103]
    assert found.shape == (4, len(layers))
    assert (found >= 0).all()
    for number, layer in enumerate(layers):
        block = solvers[layer.name]
        G = oracles.ekfac(block.basis.Q_A, block.basis.Q_S, block.eigenvalues)
        damping = 0.1 * block.eigenvalues.mean().item()
        for n, z in enumerate(sequences):
            gradient = oracles.sequence_gradient(model, layer.module, z)
            wanted = (gradient * oracles.damped_solve(G, gradient, damping)).sum()
            torch.testing.assert_close(found[n, number], wanted, rtol=1e-8, atol=1e-12)


def test_a_copy_of_a_sequence_makes_it_likelier():
    model, batch = models.mlp(), models.batch(models.corpus())
    layers = models.attributed(model)
    ((_, found),) = stream_self(model, layers, any_solvers(layers), DAMPING, [batch])
    assert (influence(-found, 8) >= 0).all()
    torch.testing.assert_close(influence(-found, 8), found / 8)


def test_batches_and_layers_that_do_not_run_change_nothing():
    model, sequences = models.gpt2(), models.corpus()
    model.unused = torch.nn.Linear(2, 3).double()
    layers = models.attributed(model)
    solvers = any_solvers(layers)
    ((_, whole),) = stream_self(model, layers, solvers, DAMPING, [models.batch(sequences)])
    alone = [models.batch([z], [100 + n]) for n, z in enumerate(sequences)]
    parts = [found for _, found in stream_self(model, layers, solvers, DAMPING, alone)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert layers[-1].name == "unused"
    assert not whole[:, -1].any()


def test_an_activation_that_is_not_finite_stops_it_and_is_named():
    model = models.mlp()
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    layers = models.attributed(model)
    batch = models.batch([(torch.tensor(z), torch.arange(2) > 0) for z in ([1, 2], [5, 1])])
    with pytest.raises(ValueError, match=r"block\.mlp\.fc1(.|\n)*101"):
        list(stream_self(model, layers, any_solvers(layers), DAMPING, [batch]))
