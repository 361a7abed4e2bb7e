"""Queries in a subspace of all: exact where they span no more, and what is lost is stated."""

import pytest
import torch

from influence.lowrank import LowRank
from influence.streaming import stream, stream_all
from influence.subspace import SharedSubspace
from tests.influence import models
from tests.influence.test_scores import some_queries


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def related(q: int, o: int, i: int, span: int, rank: int) -> LowRank:
    """All of whose factors lie in `span` columns on either side."""
    return LowRank(random(o, span) @ random(q, span, rank), random(q, rank, span) @ random(span, i))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("columns", [3, 4, 50])
def test_nothing_is_lost_where_the_queries_span_no_more(has_bias, columns):
    io = models.random_io(0, has_bias=has_bias)
    query = related(9, 2, 3 + has_bias, 2, 2)
    shared = SharedSubspace.of(query, columns)
    wanted = torch.einsum("qoi,noi->qn", query.dense(), io.gradient())
    torch.testing.assert_close(shared(io), wanted)
    assert shared.lost < 1e-6


@pytest.mark.parametrize("columns", [2, 5, 11])
def test_what_is_lost_is_what_the_projection_leaves_out(columns):
    query = related(6, 20, 14, 14, 3)
    shared = SharedSubspace.of(query, columns)
    identity = torch.eye(min(columns, 14), dtype=torch.float64)
    torch.testing.assert_close(shared.outputs.mT @ shared.outputs, identity)
    torch.testing.assert_close(shared.inputs.mT @ shared.inputs, identity)
    V = query.dense()
    approximate = shared.outputs @ shared.cores @ shared.inputs.mT
    shares = (V - approximate).square().sum(dim=(1, 2)) / V.square().sum(dim=(1, 2))
    lost = float(shares.mean().sqrt())
    assert 0 < lost < 1
    assert shared.lost == pytest.approx(lost)


def test_the_subspace_is_nearly_the_best():
    """Against both sides' singular vectors of all queries, dense."""
    query = related(30, 40, 30, 12, 4)
    V, columns = query.dense(), 6
    V = V / V.flatten(1).norm(dim=1)[:, None, None]
    U = torch.linalg.svd(V.transpose(0, 1).flatten(1))[0][:, :columns]
    W = torch.linalg.svd(V.permute(2, 0, 1).flatten(1))[0][:, :columns]
    best = float((V - U @ (U.mT @ V @ W) @ W.mT).norm() / V.norm())
    assert SharedSubspace.of(query, columns).lost <= 1.02 * best


def test_a_large_query_does_not_crowd_out_the_others():
    """As gradients before and after preconditioning would, side by side."""
    query = related(8, 20, 14, 14, 2)
    scales = torch.tensor([1e6, 1, 1, 1, 1e-6, 1, 0, 1], dtype=torch.float64)[:, None, None]
    scaled = LowRank(query.left * scales, query.right)
    one, other = SharedSubspace.of(query.select([0, 1, 2, 3, 4, 5, 7]), 6), None
    other = SharedSubspace.of(scaled.select([0, 1, 2, 3, 4, 5, 7]), 6)
    torch.testing.assert_close(other.outputs.abs(), one.outputs.abs())
    assert other.lost == pytest.approx(one.lost)
    assert SharedSubspace.of(scaled, 6).lost < 1  # a query of nothing loses nothing


def test_a_subspace_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 columns"):
        SharedSubspace.of(related(2, 3, 3, 2, 1), 0)


def test_many_queries_take_the_same_subspace_by_their_gram_matrix(monkeypatch):
    query = related(30, 40, 30, 12, 4)
    monkeypatch.setattr("influence.subspace.PART", 200)  # several parts
    small = SharedSubspace.of(query, 6)
    monkeypatch.setattr("influence.subspace.GRAM", float("inf"))
    direct = SharedSubspace.of(query, 6)
    for one, other in ((small.outputs, direct.outputs), (small.inputs, direct.inputs)):
        torch.testing.assert_close(one @ one.mT, other @ other.mT)


def test_some_queries_of_a_subspace_are_what_it_holds_of_them():
    shared = SharedSubspace.of(related(6, 20, 14, 14, 3), 5)
    held = shared.outputs @ shared.cores @ shared.inputs.mT
    torch.testing.assert_close(shared.select([4, 1]).dense(), held[[4, 1]])


def share(prepared: dict[str, LowRank], columns: int) -> dict[str, SharedSubspace]:
    return {name: SharedSubspace.of(query, columns) for name, query in prepared.items()}


@pytest.mark.parametrize("case", models.CASES)
def test_a_stream_through_a_subspace_that_holds_all_is_the_exact_one(case):
    model, batch = models.CASES[case](), models.batch(models.corpus())
    layers = models.attributed(model)
    prepared = some_queries(layers, 1)
    ((_, wanted),) = stream(model, layers, prepared, [batch])
    ((_, got),) = stream(model, layers, share(prepared, 100), [batch])
    torch.testing.assert_close(got, wanted)
    ((_, rough),) = stream(model, layers, share(prepared, 1), [batch])
    assert models.relative_error(rough, wanted) > 1e-3


@pytest.mark.parametrize("case", models.CASES)
def test_tokens_of_the_top_add_up_to_their_scores_in_a_subspace(case):
    model, batch = models.CASES[case](), models.batch(models.corpus())
    layers = models.attributed(model)
    shared = share(some_queries(layers, 1), 2)
    [told] = stream_all(model, layers, shared, [batch], top=1)
    assert told.grids
    for (q, number), grid in told.grids.items():
        [row] = (told.ids == number).nonzero()
        torch.testing.assert_close(grid.sum(dim=-1), told.scores[q, int(row)])
