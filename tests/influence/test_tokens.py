"""Token grids: every cell against its definition, and their sums against the score."""

import pytest
import torch

from influence.scores import influence
from influence.streaming import stream
from influence.tokens import TokenGrid, rescore, sparsity, token_grids
from tests import oracles
from tests.influence import models
from tests.influence.test_scores import some_queries

N = 50


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("case", models.CASES)
def test_a_cell_is_minus_one_over_n_of_its_positions_share(case, rank):
    """The position is where the update happens: the one before the predicted token."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    prepared = some_queries(layers, rank)
    grids = token_grids(model, layers, prepared, models.batch(sequences), N)
    assert grids.shape == (2, 4, len(layers), 6)
    for n, z in enumerate(sequences):
        for number, layer in enumerate(layers):
            a, ds = oracles.layer_io(model, layer.module, z)
            for q, V in enumerate(prepared[layer.name].dense()):
                cells = torch.stack([ds[t] @ V @ a[t] for t in range(len(a))])  # ds of + log p
                got = grids[q, n, number]
                torch.testing.assert_close(got[: len(a)], cells / N, rtol=1e-9, atol=1e-12)
                assert not got[len(a) :].any()


@pytest.mark.parametrize("case", models.CASES)
def test_cells_sum_over_tokens_to_the_layers_score_and_over_both_to_the_influence(case):
    model, batch = models.CASES[case](), models.batch(models.corpus())
    layers = models.attributed(model)
    prepared = some_queries(layers, 2)
    grids = token_grids(model, layers, prepared, batch, N)
    ((_, raw),) = stream(model, layers, prepared, [batch])
    torch.testing.assert_close(grids.sum(-1), influence(raw, N))
    names = tuple(layer.name for layer in layers)
    grid = TokenGrid(names, batch.tokens[0], grids[1, 0])
    assert grid.total == pytest.approx(influence(raw[1, 0].sum(), N).item(), rel=1e-12)


def test_rescoring_gives_every_score_and_a_grid_for_the_pairs_asked_for():
    model, batch = models.gpt2(), models.batch(models.corpus())
    layers = models.attributed(model)
    prepared = some_queries(layers, None)
    pairs = [(1, 0), (0, 3), (1, 3)]
    dense = {name: query.dense() for name, query in prepared.items()}
    rescored = rescore(model, layers, dense, batch, pairs, N)
    grids = token_grids(model, layers, prepared, batch, N)
    torch.testing.assert_close(rescored.scores, grids.sum(3))
    assert set(rescored.grids) == set(pairs)
    for (q, n), grid in rescored.grids.items():
        length = grid.shape[1]  # of the row or of the batch: the rest is padding
        torch.testing.assert_close(grid, grids[q, n, :, :length])
        assert not grids[q, n, :, length:].any()


def test_sparsity_is_one_for_a_spike_and_one_over_root_t_for_a_plain():
    assert sparsity(torch.tensor([0.0, -3.0, 0.0, 0.0])) == pytest.approx(1)
    assert sparsity(torch.tensor([2.0, -2.0, 2.0, 2.0])) == pytest.approx(0.5)
    assert sparsity(torch.tensor([3.0, -4.0])) == pytest.approx(5 / 7)
    assert sparsity(torch.zeros(3)) == 0  # nothing at all is no spike
