"""Losses in nats, labels sampled from the model, and the counter behind them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.objectives import (
    counter_uniform,
    forward,
    log_probability,
    pseudo_loss,
    sample_labels,
    training_loss,
)
from influence.sequences import TokenBatch
from tests import oracles
from tests.influence import models


@pytest.mark.parametrize("case", models.CASES)
def test_the_training_loss_is_the_sum_over_supervised_tokens_of_minus_log_p(case):
    model, sequences = models.CASES[case](), models.corpus()
    batch = models.batch(sequences)
    wanted = torch.stack([-oracles.log_probability(model, z) for z in sequences])
    logits = forward(model, batch)
    torch.testing.assert_close(training_loss(logits, batch), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_probability(logits, batch), -wanted, rtol=1e-12, atol=0)


def test_the_pseudo_loss_is_the_same_sum_with_other_labels():
    model, sequences = models.mlp(), models.corpus()
    batch = models.batch(sequences)
    labels = (batch.tokens + 1) % models.VOCABULARY
    wanted = [-oracles.log_probability(model, z, (z[0] + 1) % models.VOCABULARY) for z in sequences]
    logits = forward(model, batch)
    torch.testing.assert_close(pseudo_loss(logits, batch, labels), torch.stack(wanted))
    torch.testing.assert_close(
        pseudo_loss(logits, batch, batch.tokens), training_loss(logits, batch)
    )


@pytest.mark.parametrize("prompt", [1, 5])
def test_positions_without_a_loss_have_none_whether_they_are_left_out_first_or_not(prompt):
    """Few of them stay in, since a copy without them is dearer; many are left out."""
    model, sequences = models.mlp(), models.corpus(lengths=(7, 7, 6), prompt=prompt)
    for tokens, supervised in sequences:
        supervised[:] = torch.arange(len(tokens)) >= prompt
    batch = models.batch(sequences)
    assert batch.most_carry_loss == (prompt == 1)
    logits = forward(model, batch).detach().requires_grad_()
    losses = training_loss(logits, batch)
    wanted = torch.stack([-oracles.log_probability(model, z) for z in sequences])
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    [slope] = torch.autograd.grad(losses.sum(), logits)
    reaches = slope.ne(0).any(dim=-1)
    torch.testing.assert_close(reaches, batch.loss_positions)


def test_a_sequence_without_supervised_tokens_has_no_loss():
    tokens = torch.tensor([1, 2, 3])
    batch = models.batch([(tokens, torch.zeros(3, dtype=torch.bool)), (tokens, tokens > 1)])
    losses = training_loss(forward(models.mlp(), batch), batch)
    assert losses[0] == 0
    assert losses[1] > 0


def test_labels_do_not_depend_on_whether_positions_are_left_out_first(monkeypatch):
    batch = models.batch(models.corpus())
    logits, drawn = forward(models.mlp(), batch), []
    for most in (True, False):
        monkeypatch.setattr(TokenBatch, "most_carry_loss", most)
        drawn.append(sample_labels(logits, batch, seed=3))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], batch.tokens)
    assert torch.equal(drawn[0][~batch.supervised], batch.tokens[~batch.supervised])


def one_model_many_draws(num_draws: int, v: int = 5) -> tuple[torch.Tensor, TokenBatch]:
    """The same logits for many ids, three predicted positions each."""
    logits = torch.randn(1, 4, v, dtype=torch.float64) * 1.5
    supervised = torch.tensor([[False, True, True, True]]).expand(num_draws, 4)
    tokens = torch.zeros(num_draws, 4, dtype=torch.long)
    return logits.expand(num_draws, 4, v), TokenBatch(torch.arange(num_draws), tokens, supervised)


def test_labels_are_drawn_with_the_models_probabilities_at_the_position_before():
    n = 40_000
    logits, batch = one_model_many_draws(n)
    labels = sample_labels(logits, batch, seed=0)
    for t in (1, 2, 3):
        p = logits[0, t - 1].softmax(0)
        frequency = torch.bincount(labels[:, t], minlength=len(p)) / n
        # 4 standard errors, at most 0.01. The neighbouring positions' p differ by over 0.1.
        assert ((frequency - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_labels_of_two_positions_two_seeds_or_two_neighbouring_ids_are_independent():
    n = 40_000
    logits, batch = one_model_many_draws(n)
    labels = sample_labels(logits, batch, seed=0)
    other = sample_labels(logits, batch, seed=1)
    pairs = [
        (labels[:, 1], labels[:, 2]),
        (labels[:, 2], labels[:, 3]),
        (labels[:, 1], other[:, 1]),
        (labels[:-1, 1], labels[1:, 1]),
        (labels[:-1, 2], labels[1:, 1]),
    ]
    for x, y in pairs:
        joint = torch.bincount(5 * x + y, minlength=25).double().reshape(5, 5) / len(x)
        product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        chi_squared = len(x) * ((joint - product) ** 2 / product).sum()
        assert chi_squared < 39.25  # 99.9 % of χ² with 16 degrees of freedom


def test_unsupervised_tokens_get_no_sampled_label():
    batch = models.batch(models.corpus(lengths=(6,) * 40))
    labels = sample_labels(forward(models.mlp(), batch), batch, seed=0)
    assert torch.equal(labels[~batch.supervised], batch.tokens[~batch.supervised])
    assert (labels != batch.tokens)[batch.supervised].float().mean() > 0.3


def test_labels_do_not_depend_on_batch_order_or_padding():
    model, sequences = models.llama(), models.corpus(lengths=(6, 3, 5, 2, 4, 6))
    together = models.drawn_labels(model, sequences, seed=3)
    order = [4, 1, 0, 5, 3, 2]
    shuffled = models.drawn_labels(
        model, [sequences[i] for i in order], 3, [100 + i for i in order]
    )
    for place, i in enumerate(order):
        alone = models.drawn_labels(model, [sequences[i]], 3, [100 + i])[0]
        padding = (torch.ones(15, dtype=torch.long), torch.arange(15) > 0)
        padded = models.drawn_labels(model, [padding, sequences[i]], 3, [0, 100 + i])[1]
        assert torch.equal(alone, together[i])
        assert torch.equal(padded, together[i])
        assert torch.equal(shuffled[place], together[i])


def test_labels_depend_on_the_seed_and_on_the_id():
    model, sequences = models.mlp(), models.corpus(lengths=(12,) * 8)
    first = torch.stack(models.drawn_labels(model, sequences, seed=0))
    assert not torch.equal(first, torch.stack(models.drawn_labels(model, sequences, seed=1)))
    other = models.drawn_labels(model, sequences, 0, range(8))
    assert not torch.equal(first, torch.stack(other))
    assert torch.equal(first, torch.stack(models.drawn_labels(model, sequences, seed=0)))


def test_drawing_labels_leaves_torchs_generator_alone():
    batch = models.batch(models.corpus())
    logits = forward(models.mlp(), batch)
    before = torch.random.get_rng_state()
    sample_labels(logits, batch, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_label_that_the_model_excludes_is_never_drawn():
    logits, batch = one_model_many_draws(20_000)
    logits = logits.clone()
    logits[..., [0, 4]] = -math.inf  # both ends of the cumulative sum
    labels = sample_labels(logits, batch, seed=0)[:, 1:]
    assert labels.min() >= 1
    assert labels.max() <= 3


def test_a_certain_label_is_always_drawn():
    logits, batch = one_model_many_draws(1000)
    logits = torch.full_like(logits, -1e4)
    logits[..., 4] = 0.0
    assert (sample_labels(logits, batch, seed=0)[:, 1:] == 4).all()


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4, unique=True),
    st.integers(1, 9),
)
def test_uniforms_lie_in_the_unit_interval_and_a_longer_row_only_adds_to_a_shorter(seed, ids, t):
    keys = torch.tensor(ids)
    u = counter_uniform(seed, keys, t)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    assert torch.equal(counter_uniform(seed, keys, t + 3)[:, :t], u)
    for row, key in enumerate(ids):
        assert torch.equal(counter_uniform(seed, torch.tensor([key]), t)[0], u[row])


@pytest.mark.parametrize("axis", ["ids", "positions", "seeds", "ids a power of two apart"])
def test_uniforms_are_uniform_and_uncorrelated_along_every_coordinate(axis):
    n = 1_500 if axis == "seeds" else 10_000
    u = {
        "ids": lambda: counter_uniform(5, torch.arange(n), 1)[:, 0],
        "positions": lambda: counter_uniform(5, torch.tensor([17]), n)[0],
        "seeds": lambda: torch.cat(
            [counter_uniform(s, torch.tensor([17]), 1)[0] for s in range(n)]
        ),
        "ids a power of two apart": lambda: counter_uniform(5, torch.arange(n) * 2**32, 1)[:, 0],
    }[axis]()
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = (u.sort().values - steps).abs().max()
    assert distance < 1.95 / math.sqrt(n) + 1 / n  # Kolmogorov-Smirnov, 99.9 %
    for lag in (1, 2, 3):
        correlation = torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]
        assert correlation.abs() < 3.3 / math.sqrt(n)  # 99.9 %
