"""A and S against brute force, for the labels drawn and for all labels enumerated."""

import functools
import math

import pytest
import torch

from influence.factors import Covariance, Factors, fit_factors
from influence.layers import share_inputs
from tests import oracles
from tests.influence import models

SEED = 11


def equal(left: Factors, right: Factors) -> bool:
    """Bit for bit."""
    return all(
        mine.keys() == theirs.keys()
        and all(torch.equal(mine[k].sum, theirs[k].sum) for k in mine)
        and all(mine[k].num_tokens == theirs[k].num_tokens for k in mine)
        for mine, theirs in ((left.inputs, right.inputs), (left.outputs, right.outputs))
    )


@pytest.mark.parametrize("case", models.CASES)
def test_A_and_S_are_the_oracles_for_the_labels_drawn(case):
    """Padding and prompts are in the batch and counted nowhere."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    factors = fit_factors(model, layers, [models.batch(sequences)], SEED)
    labels = models.drawn_labels(model, sequences, SEED)
    for layer in layers:
        A, S = oracles.kronecker_factors(model, layer.module, sequences, labels)
        got = factors.of(layer)
        torch.testing.assert_close(got.A.value, A, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(got.S.value, S, rtol=1e-10, atol=1e-13)
        assert got.A.num_tokens == got.S.num_tokens == sum(z[1].sum().item() for z in sequences)


def test_A_and_S_are_means_over_tokens_and_not_over_sequences():
    """EK-FAC cannot see the difference; K-FAC would be off by the length."""
    model = models.mlp()
    (layer,) = (found for found in models.attributed(model) if found.name == "head")
    long, short = models.corpus(lengths=(9, 2), prompt=1)
    both = fit_factors(model, [layer], [models.batch([long, short])], SEED).of(layer)
    of_long = fit_factors(model, [layer], [models.batch([long], [100])], SEED).of(layer)
    of_short = fit_factors(model, [layer], [models.batch([short], [101])], SEED).of(layer)
    for got, one, other in ((both.A, of_long.A, of_short.A), (both.S, of_long.S, of_short.S)):
        torch.testing.assert_close(got.value, (8 * one.value + 1 * other.value) / 9)
        assert models.relative_error(got.value, (one.value + other.value) / 2) > 0.05
    assert both.A.value[-1, -1] == 1  # of a bias, so the mean of ones, not their sum


def test_a_bias_adds_a_column_of_ones_to_the_inputs():
    model, sequences = models.mlp(), models.corpus()
    layers = models.attributed(model)
    factors = fit_factors(model, layers, [models.batch(sequences)], SEED)
    for layer in layers:
        A = factors.of(layer).A.value
        assert A.shape == (layer.d_in, layer.d_in)
        inputs = [oracles.layer_io(model, layer.module, z)[0] for z in sequences]
        rows = [
            a[t - 1] for a, z in zip(inputs, sequences, strict=True) for t in oracles.targets(z)
        ]
        torch.testing.assert_close(A[-1], torch.stack(rows).mean(0))


def test_unsupervised_sequences_and_padding_add_nothing():
    model, sequences = models.llama(), models.corpus()
    layers = models.attributed(model)
    silent = (torch.ones(12, dtype=torch.long), torch.zeros(12, dtype=torch.bool))
    got = fit_factors(model, layers, [models.batch([*sequences, silent])], SEED)
    wanted = fit_factors(model, layers, [models.batch(sequences)], SEED)
    for layer in layers:
        assert got.of(layer).A.num_tokens == wanted.of(layer).A.num_tokens
        torch.testing.assert_close(got.of(layer).A.value, wanted.of(layer).A.value)
        torch.testing.assert_close(got.of(layer).S.value, wanted.of(layer).S.value)


def test_layers_with_one_input_share_one_A_and_it_is_the_one_each_would_have_alone():
    model, sequences = models.llama(), models.corpus()
    alone = models.attributed(model)
    together = share_inputs(model, alone, sequences[0][0][None])
    batches = [models.batch(sequences)]
    shared, separate = (fit_factors(model, layers, batches, SEED) for layers in (together, alone))
    assert set(shared.inputs) == {layer.input_group for layer in together}
    assert len(shared.inputs) == len(alone) - 3  # k and v with q, up with gate
    for mine, own in zip(together, alone, strict=True):
        torch.testing.assert_close(shared.of(mine).A.value, separate.of(own).A.value)
        torch.testing.assert_close(shared.of(mine).S.value, separate.of(own).S.value)
        assert shared.of(mine).A.num_tokens == separate.of(own).A.num_tokens  # each token once


def test_the_seed_changes_S_and_not_A():
    model, batches = models.mlp(), [models.batch(models.corpus())]
    layers = models.attributed(model)
    one, two, again = (fit_factors(model, layers, batches, seed) for seed in (1, 2, 1))
    assert equal(one, again)
    for layer in layers:
        assert torch.equal(one.of(layer).A.sum, two.of(layer).A.sum)
        assert not torch.allclose(one.of(layer).S.sum, two.of(layer).S.sum)


def test_true_labels_would_give_another_S():
    """What the empirical Fisher would be: the wrong curvature, far from what is fitted."""
    model, sequences = models.mlp(), models.corpus(lengths=(6,) * 30)
    (layer,) = (found for found in models.attributed(model) if found.name == "head")
    S = fit_factors(model, [layer], [models.batch(sequences)], SEED).of(layer).S.value
    _, true = oracles.kronecker_factors(model, layer.module, sequences, [z[0] for z in sequences])
    _, expected = oracles.expected_kronecker_factors(model, layer.module, sequences)
    assert models.relative_error(S, expected) < 0.3
    assert models.relative_error(true, expected) > 0.6


@pytest.mark.parametrize("case", ["mlp", "llama"])
def test_S_of_sampled_labels_tends_to_S_of_all_labels_at_rate_one_over_root_n(case):
    """Copies under other ids draw other labels. Slope −0.5 ± 0.1, over 4 seeds and 3 layers."""
    model, sequences = models.CASES[case](), models.corpus(lengths=(4, 3))
    layers = models.attributed(model)[-3:]
    exact = {
        layer.name: oracles.expected_kronecker_factors(model, layer.module, sequences)
        for layer in layers
    }
    sizes, log_errors = (8, 64, 512, 4096), []
    for copies in sizes:
        batch = models.batch(sequences * copies)
        squared = []
        for seed in range(4):
            factors = fit_factors(model, layers, [batch], seed)
            for layer in layers:
                A, S = exact[layer.name]
                torch.testing.assert_close(factors.of(layer).A.value, A)
                error = torch.linalg.norm(factors.of(layer).S.value - S) / torch.linalg.norm(S)
                squared.append(error.item() ** 2)
        log_errors.append(math.log(sum(squared) / len(squared)) / 2)
    x = torch.tensor([math.log(n) for n in sizes], dtype=torch.float64)
    y = torch.tensor(log_errors, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0]
    assert abs(slope.item() + 0.5) < 0.1
    assert math.exp(log_errors[-1]) < 0.05  # true labels stay at 0.5 and more


def test_shards_add_up_to_the_whole_and_in_a_fixed_order_to_the_last_bit():
    model, sequences = models.gpt2(), models.corpus(lengths=(6, 3, 5, 2, 4, 4))
    layers = models.attributed(model)

    def shard(start: int, stop: int) -> Factors:
        ids = range(100 + start, 100 + stop)
        return fit_factors(model, layers, [models.batch(sequences[start:stop], ids)], SEED)

    whole = shard(0, 6)
    first, second, third = shard(0, 2), shard(2, 4), shard(4, 6)
    again = [shard(4, 6), shard(0, 2), shard(2, 4)]  # made in another order, merged in the same
    merged = first + second + third
    assert equal(merged, functools.reduce(Factors.__add__, [again[1], again[2], again[0]]))
    for layer in layers:
        for got, wanted in (
            (merged.of(layer).A, whole.of(layer).A), (merged.of(layer).S, whole.of(layer).S),
        ):  # fmt: skip
            assert got.num_tokens == wanted.num_tokens
            torch.testing.assert_close(got.sum, wanted.sum, rtol=1e-12, atol=1e-13)


def test_covariances_add_sums_and_counts():
    one = Covariance(torch.eye(2, dtype=torch.float64), 2)
    total = one + Covariance(3 * torch.ones(2, 2, dtype=torch.float64), 6)
    assert total.num_tokens == 8
    assert total.value.tolist() == [[0.5, 0.375], [0.375, 0.5]]


def test_sums_of_a_float32_pass_are_kept_in_float64():
    model, batches = models.mlp().float(), [models.batch(models.corpus())]
    layers = models.attributed(model)
    factors = fit_factors(model, layers, batches, SEED)
    assert {c.sum.dtype for c in (*factors.inputs.values(), *factors.outputs.values())} == {
        torch.float64
    }


BAD_WEIGHTS = {
    "below the layers": ("embedding.weight", 5, r"block\.mlp\.fc1"),
    "in a layer": ("block.mlp.fc2.weight", 0, r"block\.mlp\.fc2|head"),
    "in the last layer": ("head.weight", 2, "head"),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", BAD_WEIGHTS)
def test_an_activation_that_is_not_finite_stops_the_fit_naming_layer_and_first_sequence(place, bad):
    """Token 5, whose embedding may be bad, is in sequences 42 and 43 only."""
    name, row, layer = BAD_WEIGHTS[place]
    model = models.mlp()
    with torch.no_grad():
        model.get_parameter(name)[row] = bad
    tokens = [torch.tensor(row) for row in ([1, 2, 3], [1, 5, 3], [5, 2, 2])]
    batch = models.batch([(x, torch.arange(3) > 0) for x in tokens], [41, 42, 43])
    first = 42 if place == "below the layers" else 41
    with pytest.raises(ValueError, match=rf"({layer})(.|\n)*{first}"):
        fit_factors(model, models.attributed(model), [batch], SEED)


def test_a_value_that_is_not_finite_above_all_layers_stops_the_fit():
    """No layer sees it, but every ds would be NaN."""
    model = models.mlp()
    with torch.no_grad():
        model.head.weight[2] = float("inf")
    layers = [layer for layer in models.attributed(model) if layer.name != "head"]
    with pytest.raises(ValueError, match="100"):
        fit_factors(model, layers, [models.batch(models.corpus())], SEED)
