"""Many consumers of one pass: each is told what a pass of its own would tell."""

import pytest
import torch

from influence.damping import AbsoluteDamping
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.selfinfluence import SelfInfluence, stream_self
from influence.streaming import Told, stream, stream_all
from influence.tokens import token_grids
from tests.influence import models
from tests.influence.test_scores import some_queries
from tests.influence.test_selfinfluence import DAMPING, any_solvers

# Bytes of memory for each weight. The dense matrices of both queries would take 16: with less
# they are made anew, for each sequence or, where there is room for it to wait, for several.
AT_ONCE, WAITING, KEPT = 1, 15, 2**20


def bytes_of(layers: tuple[Layer, ...], a_weight: int) -> int:
    return a_weight * sum(layer.d_in * layer.d_out for layer in layers)


def by_id(told: list[Told]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {
        int(number): (each.scores[:, n], each.self_influence[n])
        for each in told
        if each.self_influence is not None
        for n, number in enumerate(each.ids)
    }


@pytest.mark.parametrize("memory", [AT_ONCE, WAITING, KEPT])
@pytest.mark.parametrize("case", models.CASES)
def test_scores_and_self_influence_of_one_pass_are_those_of_two(case, memory):
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    prepared, solvers = some_queries(layers, None), any_solvers(layers)
    batches = [models.batch(sequences[:1]), models.batch(sequences[1:], [101, 102, 103])]
    passes: list[int] = []
    room = bytes_of(layers, memory)
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    told = list(stream_all(model, layers, prepared, batches, room, SelfInfluence(solvers, DAMPING)))
    handle.remove()
    assert len(passes) == len(batches)
    raw = torch.cat([raw for _, raw in stream(model, layers, prepared, batches)], dim=1)
    forms = torch.cat([own for _, own in stream_self(model, layers, solvers, DAMPING, batches)])
    found = by_id(told)
    assert sorted(found) == [100, 101, 102, 103]
    for n, number in enumerate(sorted(found)):
        torch.testing.assert_close(found[number][0], raw[:, n])
        torch.testing.assert_close(found[number][1], forms[n])


def test_a_grid_of_dampings_is_more_queries():
    """Solved with each λ they meet the same gradients."""
    model, batch = models.mlp(), models.batch(models.corpus())
    layers = models.attributed(model)
    solvers = any_solvers(layers)
    V = {name: query.dense() for name, query in some_queries(layers, None).items()}

    def solved(value: float) -> dict[str, LowRank]:
        damping = AbsoluteDamping(value)
        return {name: LowRank.of(solvers[name].solve(V[name], damping), None) for name in V}

    grid = [solved(value) for value in (0.1, 1.0)]
    both = {
        name: LowRank(
            torch.cat([each[name].left for each in grid]),
            torch.cat([each[name].right for each in grid]),
        )
        for name in V
    }
    ((_, together),) = stream(model, layers, both, [batch])
    apart = [raw for each in grid for _, raw in stream(model, layers, each, [batch])]
    torch.testing.assert_close(together, torch.cat(apart))


def told_of_top(model, layers: tuple[Layer, ...], batches, memory: int, top: int) -> list[Told]:
    room = bytes_of(layers, memory)
    return list(stream_all(model, layers, some_queries(layers, 1), batches, room, top=top))


@pytest.mark.parametrize("memory", [AT_ONCE, WAITING, KEPT])
@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("case", models.CASES)
def test_token_grids_of_the_top_come_with_the_scores(monkeypatch, case, forms, memory):
    monkeypatch.setattr("influence.contraction.forms_gradients", lambda *_: forms)
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    batches = [models.batch([z], [100 + n]) for n, z in enumerate(sequences)]
    told = told_of_top(model, layers, batches, memory, top=1)
    totals = torch.cat([each.scores.sum(dim=-1) for each in told], dim=1)
    grids = {key: grid for each in told for key, grid in each.grids.items()}
    for q, row in enumerate(totals):
        assert (q, 100 + int(row.argmax())) in grids
        assert (q, 100 + int(row.argmin())) in grids
    for (q, number), grid in grids.items():
        torch.testing.assert_close(grid.sum(), totals[q, number - 100])
        batch = batches[number - 100]
        [wanted] = token_grids(model, layers, some_queries(layers, 1), batch, 1)[q]
        torch.testing.assert_close(grid, -wanted)


def test_a_grid_is_told_of_those_alone_that_enter_the_top():
    model, sequences = models.mlp(), models.corpus()
    layers = models.attributed(model)
    batches = [models.batch([z], [100 + n]) for n, z in enumerate([sequences[0]] * 9)]
    told = told_of_top(model, layers, batches, KEPT, top=2)
    seen = {number for each in told for _, number in each.grids}
    assert seen == {100, 101}  # of equals, the first are the top; no later one enters
    assert not any(each.grids for each in told_of_top(model, layers, batches, KEPT, top=0))
