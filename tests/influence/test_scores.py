"""Scores: contractions against loops, the sign and the 1/N, and the top k."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence import contraction
from influence.contraction import forms_gradients
from influence.lowrank import LowRank
from influence.scores import TopK, influence
from influence.streaming import stream
from tests import oracles
from tests.influence import models


def matrices(q: int, o: int, i: int, rank: int | None, seed: int = 5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank.of(torch.randn(q, o, i, generator=generator, dtype=torch.float64), rank)


def some_queries(layers, rank: int | None) -> dict[str, LowRank]:
    """Two queries, whatever they ask."""
    return {
        layer.name: matrices(2, layer.d_out, layer.d_in, rank, seed)
        for seed, layer in enumerate(layers)
    }


def test_influence_is_minus_the_raw_contraction_over_n():
    raw = torch.tensor([[2.0, -4.0], [0.0, 1.0]], dtype=torch.float64)
    assert influence(raw, 8).tolist() == [[-0.25, 0.5], [0.0, -0.125]]


@pytest.mark.parametrize("n", [0, -1])
def test_a_training_set_without_sequences_is_refused(n):
    with pytest.raises(ValueError, match=str(n)):
        influence(torch.ones(2), n)


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("case", models.CASES)
def test_a_stream_contracts_every_query_with_every_sequences_loss_gradient(case, rank):
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    prepared = some_queries(layers, rank)
    ((ids, raw),) = stream(model, layers, prepared, [models.batch(sequences)])
    assert ids.tolist() == [100, 101, 102, 103]
    assert raw.shape == (2, 4, len(layers))
    for (n, z), (number, layer) in itertools.product(enumerate(sequences), enumerate(layers)):
        gradient = -oracles.sequence_gradient(model, layer.module, z)
        for q, V in enumerate(prepared[layer.name].dense()):
            wanted = torch.dot(oracles.vec(V), oracles.vec(gradient))
            torch.testing.assert_close(raw[q, n, number], wanted, rtol=1e-9, atol=1e-11)


def test_sequences_without_a_supervised_token_score_zero_alone_and_in_company():
    model, (z, *_) = models.gpt2(), models.corpus()
    silent = (z[0], torch.zeros_like(z[1]))
    layers = models.attributed(model)
    batches = [
        models.batch([silent]),
        models.batch([silent, z]),
        models.batch([(z[0][:1], z[1][:1])]),
    ]
    alone, company, single = stream(model, layers, some_queries(layers, None), batches)
    assert not alone[1].any()
    assert not single[1].any()
    assert not company[1][:, 0].any()
    assert company[1][:, 1].any()


def test_layers_come_in_the_order_asked_for():
    model, batches = models.mlp(), [models.batch(models.corpus())]
    layers = models.attributed(model)
    prepared = some_queries(layers, None)
    ((_, raw),) = stream(model, layers, prepared, batches)
    ((_, reverse),) = stream(model, layers[::-1], prepared, batches)
    torch.testing.assert_close(reverse.flip(2), raw)


def test_a_layer_that_a_batch_does_not_run_scores_zero():
    model = models.mlp()
    model.unused = torch.nn.Linear(2, 3).double()
    layers = models.attributed(model)
    prepared = some_queries(layers, None)
    ((_, raw),) = stream(model, layers, prepared, [models.batch(models.corpus())])
    assert layers[-1].name == "unused"
    assert not raw[..., -1].any()
    assert raw[..., :-1].all()


@pytest.mark.parametrize("row", [[5, 1], [1, 5]])
def test_an_activation_that_is_not_finite_stops_the_stream_and_is_named(row):
    """Also at the last position: it feeds no loss, but 0 · NaN is NaN in the score."""
    model = models.mlp()
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    layers = models.attributed(model)
    sequences = [(torch.tensor(z), torch.arange(2) > 0) for z in ([1, 2], row)]
    with pytest.raises(ValueError, match=r"block\.mlp\.fc1(.|\n)*101"):
        list(stream(model, layers, some_queries(layers, 1), [models.batch(sequences)]))


def test_both_ways_of_contracting_occur_in_the_streams_above():
    model = models.gpt2()
    layers = models.attributed(model)
    chosen = {
        forms_gradients(some_queries(layers, rank)[layer.name], num_positions, float("inf"))
        for layer in layers
        for rank in (1, None)
        for num_positions in (2, 6)
    }
    assert chosen == {True, False}


@pytest.mark.parametrize("fitting", [0.1, 1, 2.5, 5, 12])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_gradients_that_wait_for_the_queries_score_the_same(case, fitting, monkeypatch):
    """With memory for so many gradients: they meet the queries at once, or wait for each other and
    meet some of the queries at a time."""
    model, sequences = models.CASES[case](), models.corpus(lengths=(6, 3, 5, 2, 4, 4, 5))
    model.unused = torch.nn.Linear(2, 3).double()
    layers = models.attributed(model)
    prepared = {
        layer.name: matrices(12, layer.d_out, layer.d_in, 2, seed)
        for seed, layer in enumerate(layers)
    }
    batches = [models.batch(sequences[n : n + 2], range(n, n + 2)) for n in (0, 2, 4)]
    batches.append(models.batch(sequences[6:], [6]))
    wanted = [raw for _, raw in stream(model, layers, prepared, batches)]
    # On shapes as small as these, tokens would be the cheaper way.
    monkeypatch.setattr(contraction, "forms_gradients", lambda query, *_: query.left.shape[1] > 2)
    one = sum(8 * layer.d_out * layer.d_in for layer in layers)
    got = list(stream(model, layers, prepared, batches, int(fitting * one)))
    assert [ids.tolist() for ids, _ in got] == [[0, 1], [2, 3], [4, 5], [6]]
    for (_, raw), expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(raw, expected, rtol=1e-9, atol=1e-11)


def test_what_waits_stays_within_the_budget(monkeypatch):
    model, sequences = models.gpt2(), models.corpus(lengths=(4,) * 9)
    layers = models.attributed(model)
    prepared = {
        layer.name: matrices(50, layer.d_out, layer.d_in, 1, seed)
        for seed, layer in enumerate(layers)
    }
    one = sum(8 * layer.d_out * layer.d_in for layer in layers)
    monkeypatch.setattr(contraction, "forms_gradients", lambda *_: True)
    waited = []
    finish = contraction.Contractions.finish

    def watched(self, name, waiting):
        waited.append(sum(len(each.gradients) for each in waiting))
        return finish(self, name, waiting)

    monkeypatch.setattr(contraction.Contractions, "finish", watched)
    batches = [models.batch([z], [n]) for n, z in enumerate(sequences)]
    assert len(list(stream(model, layers, prepared, batches, memory=4 * one))) == 9
    assert set(waited) == {4, 1}  # twice four, and the last


@given(st.data())
def test_the_top_k_is_the_same_however_the_scores_are_sharded_and_merged(data):
    """Few distinct scores, so ties are common; the smaller id wins. Shards may be below k."""
    n, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    ids = data.draw(st.permutations(range(50, 50 + n)))
    scores = data.draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=1, max_size=2)
    )
    table = torch.tensor(scores, dtype=torch.float64)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(()))), n]
    shards = [
        TopK.of(torch.tensor(ids[a:b]), table[:, a:b], k) for a, b in itertools.pairwise(cuts)
    ]
    merged, *rest = data.draw(st.permutations(shards))
    for shard in rest:
        merged = merged.merge(shard)
    for q, row in enumerate(scores):
        wanted = oracles.top_k(ids, row, k)
        assert merged.ids[q].tolist() == [key for key, _ in wanted]
        assert merged.scores[q].tolist() == [score for _, score in wanted]


def test_the_top_of_fewer_than_k_is_all_of_them():
    top = TopK.of(torch.tensor([7, 3]), torch.tensor([[1.0, 2.0]]), 5)
    assert top.ids.tolist() == [[3, 7]]


def test_a_shard_with_fewer_than_k_loses_nothing_of_the_other():
    small = TopK.of(torch.tensor([7]), torch.tensor([[1.0]]), 3)
    large = TopK.of(torch.tensor([1, 2, 3, 4]), torch.tensor([[0.0, 2.0, 3.0, 4.0]]), 3)
    for merged in (small.merge(large), large.merge(small)):
        assert merged.ids.tolist() == [[4, 3, 2]]


def test_tops_of_different_k_are_not_merged():
    ids, scores = torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]])
    with pytest.raises(ValueError, match="top 1 and a top 2"):
        TopK.of(ids, scores, 1).merge(TopK.of(ids, scores, 2))
