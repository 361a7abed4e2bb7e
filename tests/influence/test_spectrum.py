"""Λ: the mean over sequences of the square of the sum over tokens."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from influence.eigenbasis import EigenBasis
from influence.layers import Layer, share_inputs
from influence.spectrum import Spectrum, fit_spectra
from tests import oracles
from tests.influence import models

SEED = 12


def any_bases(layers: tuple[Layer, ...]) -> dict[str, EigenBasis]:
    """Λ is defined for any orthogonal basis; a random one is far from rows = columns. Layers with
    one input have one Q_A."""
    inputs = {e.input_group: models.orthogonal(2 * n, e.d_in) for n, e in enumerate(layers)}
    return {
        layer.name: EigenBasis(inputs[layer.input_group], models.orthogonal(2 * n + 1, layer.d_out))
        for n, layer in enumerate(layers)
    }


@pytest.mark.parametrize("case", models.CASES)
def test_the_spectrum_is_the_oracles_for_the_labels_drawn(case):
    """Sum over tokens, prompt included, then rotate, then square, then mean over sequences."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = share_inputs(model, models.attributed(model), torch.zeros(1, 2, dtype=torch.int64))
    bases = any_bases(layers)
    spectra = fit_spectra(model, layers, bases, [models.batch(sequences)], SEED)
    labels = models.drawn_labels(model, sequences, SEED)
    for layer in layers:
        gradients = [
            oracles.sequence_gradient(model, layer.module, z, drawn)
            for z, drawn in zip(sequences, labels, strict=True)
        ]
        basis = bases[layer.name]
        wanted = oracles.spectrum(gradients, basis.Q_A, basis.Q_S)
        got = spectra[layer.name]
        assert got.num_sequences == len(sequences)
        torch.testing.assert_close(got.values, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", models.CASES)
def test_the_eigenvalues_sum_to_the_mean_squared_norm_of_the_gradients(case):
    """Of the first sequence's largest output gradient, norms before and after are kept."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    batches = [models.batch(sequences[:3]), models.batch(sequences[3:], [103])]
    spectra = fit_spectra(model, layers, any_bases(layers), batches, SEED)
    labels = models.drawn_labels(model, sequences, SEED)
    for layer in layers:
        norms = [
            oracles.sequence_gradient(model, layer.module, z, drawn).square().sum()
            for z, drawn in zip(sequences, labels, strict=True)
        ]
        got = spectra[layer.name]
        a, ds = oracles.layer_io(model, layer.module, sequences[0], labels[0])
        largest = ds.square().sum(dim=1).argmax()
        wanted = ds[largest].square().sum() * a[largest].square().sum()
        torch.testing.assert_close(got.norm_sum, wanted)
        torch.testing.assert_close(got.rotated_norm_sum, wanted)
        torch.testing.assert_close(got.values.sum(), torch.stack(norms).mean())


def test_a_basis_that_is_not_orthogonal_shows_in_the_trace_ratio():
    model = models.mlp()
    layers = models.attributed(model)
    bases = any_bases(layers)
    skewed = {k: EigenBasis(1.1 * b.Q_A, b.Q_S) for k, b in bases.items()}
    batches = [models.batch(models.corpus())]
    right, wrong = (fit_spectra(model, layers, b, batches, SEED) for b in (bases, skewed))
    for layer in layers:
        assert right[layer.name].trace_ratio == pytest.approx(1, abs=1e-12)
        assert wrong[layer.name].trace_ratio == pytest.approx(1.21)


@pytest.mark.parametrize("case", ["mlp", "llama"])
def test_the_spectrum_of_sampled_labels_tends_to_the_diagonal_of_the_rotated_fisher(case):
    """Λ → diag(QᵀFQ) with all labels enumerated, each entry within its own error bar."""
    model, sequences = models.CASES[case](), models.corpus(lengths=(4, 3))
    layers = models.attributed(model)[:3]
    bases = any_bases(layers)
    copies, errors = 3000, []
    spectra = fit_spectra(model, layers, bases, [models.batch(sequences * copies)], SEED)
    for layer in layers:
        basis, got = bases[layer.name], spectra[layer.name].values
        F = oracles.fisher(model, layer.module, sequences)
        wanted = oracles.expected_spectrum(F, basis.Q_A, basis.Q_S)
        errors.append((got - wanted) / wanted)
    relative = torch.cat([e.flatten() for e in errors])
    # A square of one random term has relative spread of order 1 to 3, so 6000 of them 0.02 to 0.05.
    # True labels leave 0.5; squares summed over tokens leave 0.3.
    assert relative.abs().median() < 0.03
    assert relative.abs().max() < 0.2


def test_the_error_against_the_enumerated_labels_falls_as_one_over_root_n():
    """Slope −0.5 ± 0.1 over 4 seeds: an estimator with a bias would level off."""
    model, sequences = models.mlp(), models.corpus(lengths=(4, 3))
    layers = models.attributed(model)
    bases = any_bases(layers)
    exact = {
        layer.name: oracles.expected_spectrum(
            oracles.fisher(model, layer.module, sequences),
            bases[layer.name].Q_A,
            bases[layer.name].Q_S,
        )
        for layer in layers
    }
    sizes, log_errors = (8, 64, 512, 4096), []
    for copies in sizes:
        batch, squared = models.batch(sequences * copies), []
        for seed in range(4):
            for name, got in fit_spectra(model, layers, bases, [batch], seed).items():
                error = torch.linalg.norm(got.values - exact[name]) / torch.linalg.norm(exact[name])
                squared.append(error.item() ** 2)
        log_errors.append(math.log(sum(squared) / len(squared)) / 2)
    x = torch.tensor([math.log(n) for n in sizes], dtype=torch.float64)
    y = torch.tensor(log_errors, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0]
    assert abs(slope.item() + 0.5) < 0.1


def test_squaring_before_the_sum_over_tokens_would_be_far_off():
    """Two equal tokens have a squared sum of 4 and a sum of squares of 2."""
    model = models.mlp()
    sequences = [(torch.full((8,), token), torch.arange(8) > 0) for token in (1, 2, 3, 4)]
    layers = models.attributed(model)
    bases = any_bases(layers)
    spectra = fit_spectra(model, layers, bases, [models.batch(sequences)], SEED)
    labels = models.drawn_labels(model, sequences, SEED)
    for layer in layers:
        basis, terms = bases[layer.name], []
        for z, drawn in zip(sequences, labels, strict=True):
            a, ds = oracles.layer_io(model, layer.module, z, drawn)
            terms.append([torch.outer(ds[t], a[t]) for t in range(len(a))])
        per_token = sum(
            len(of_one) * oracles.spectrum(of_one, basis.Q_A, basis.Q_S) for of_one in terms
        ) / len(terms)
        got = spectra[layer.name].values
        assert models.relative_error(per_token, got) > 0.3


def test_duplicating_the_corpus_leaves_the_spectrum_unchanged():
    model, sequences = models.gpt2(), models.corpus()
    layers = models.attributed(model)
    once = models.batch(sequences, range(4))
    twice = models.batch(sequences * 2, [0, 1, 2, 3, 0, 1, 2, 3])
    bases = any_bases(layers)
    one, two = (fit_spectra(model, layers, bases, [b], SEED) for b in (once, twice))
    for name in one:
        assert two[name].num_sequences == 2 * one[name].num_sequences
        torch.testing.assert_close(two[name].values, one[name].values)


def test_shards_add_up_to_the_whole_and_in_a_fixed_order_to_the_last_bit():
    model, sequences = models.mlp(), models.corpus(lengths=(6, 3, 5, 2, 4, 4))
    layers = models.attributed(model)

    def shard(start: int, stop: int) -> dict[str, Spectrum]:
        batch = models.batch(sequences[start:stop], range(100 + start, 100 + stop))
        return fit_spectra(model, layers, any_bases(layers), [batch], SEED)

    whole, first, second, third = shard(0, 6), shard(0, 2), shard(2, 4), shard(4, 6)
    again = {4: shard(4, 6), 0: shard(0, 2), 2: shard(2, 4)}
    for layer in layers:
        merged = functools.reduce(
            Spectrum.__add__, [shard[layer.name] for shard in (first, second, third)]
        )
        same = functools.reduce(Spectrum.__add__, [again[k][layer.name] for k in sorted(again)])
        assert torch.equal(merged.squared_sum, same.squared_sum)
        assert torch.equal(merged.norm_sum, same.norm_sum)
        assert torch.equal(merged.rotated_norm_sum, same.rotated_norm_sum)
        wanted = whole[layer.name]
        assert merged.num_sequences == wanted.num_sequences == 6
        torch.testing.assert_close(merged.squared_sum, wanted.squared_sum, rtol=1e-12, atol=1e-13)


class SometimesIdle(models.MLPLanguageModel):
    """A layer that runs only when a token 5 is in the batch, and acts on tokens 5 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = torch.nn.Linear(3, 3)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        chosen = (input_ids == 5).unsqueeze(-1)
        if chosen.any():
            x = x + self.expert(x) * chosen
        return SimpleNamespace(logits=self.head(self.block["mlp"](x)))


def test_a_layer_that_some_batches_do_not_run_counts_their_sequences_all_the_same():
    """Else its Λ, a mean over sequences, would depend on how they are batched."""
    model = models.randomise(SometimesIdle(), 0)
    layers = models.attributed(model)
    sequences = [(torch.tensor(row), torch.arange(3) > 0) for row in ([1, 5, 2], [1, 2, 3])]
    ways = [
        [models.batch(sequences)],
        [models.batch([z], [100 + n]) for n, z in enumerate(sequences)],
        [models.batch([sequences[n]], [100 + n]) for n in (1, 0)],
    ]
    one, *others = (
        fit_spectra(model, layers, any_bases(layers), batches, SEED) for batches in ways
    )
    alone = fit_spectra(model, layers, any_bases(layers), ways[1][:1], SEED)["expert"].values
    torch.testing.assert_close(one["expert"].values, alone / 2)
    for other in others:
        torch.testing.assert_close(other["expert"].values, one["expert"].values)


def test_spectra_add_sums_and_counts():
    ones, six = torch.ones(2, 3, dtype=torch.float64), torch.tensor(6.0).double()
    one = Spectrum(ones, norm_sum=six, rotated_norm_sum=2 * six, num_sequences=1)
    total = one + Spectrum(5 * ones, norm_sum=5 * six, rotated_norm_sum=4 * six, num_sequences=3)
    assert total.num_sequences == 4
    torch.testing.assert_close(total.values, 1.5 * ones)
    assert total.trace_ratio == 1


def test_fresh_labels_come_with_another_seed():
    model, batches = models.mlp(), [models.batch(models.corpus())]
    layers = models.attributed(model)
    one, two = (fit_spectra(model, layers, any_bases(layers), batches, s) for s in (1, 2))
    assert all(not torch.allclose(one[k].values, two[k].values) for k in one)


def test_sums_of_a_float32_pass_are_kept_in_float64():
    model, batches = models.mlp().float(), [models.batch(models.corpus())]
    layers = models.attributed(model)
    bases = {k: b.to(torch.float32, "cpu") for k, b in any_bases(layers).items()}
    for spectrum in fit_spectra(model, layers, bases, batches, SEED).values():
        assert spectrum.squared_sum.dtype == spectrum.norm_sum.dtype == torch.float64


def test_an_activation_that_is_not_finite_stops_the_fit_and_is_named():
    model = models.mlp()
    with torch.no_grad():
        model.block["mlp"].fc2.weight[0, 0] = float("inf")
    layers = models.attributed(model)
    with pytest.raises(ValueError, match=r"head(.|\n)*100"):
        fit_spectra(model, layers, any_bases(layers), [models.batch(models.corpus())], SEED)


def test_a_gradient_that_is_not_finite_though_the_loss_is_stops_the_fit_and_is_named():
    """The last position feeds no loss, but 0 · NaN is NaN in the sum over positions."""
    model = models.mlp()
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    layers = models.attributed(model)
    batch = models.batch([(torch.tensor(z), torch.arange(3) > 0) for z in ([1, 2, 3], [1, 2, 5])])
    with pytest.raises(ValueError, match=r"block\.mlp\.fc1(.|\n)*101"):
        fit_spectra(model, layers, any_bases(layers), [batch], SEED)
