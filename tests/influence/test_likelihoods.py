"""Loss, curvature, divergence and draws of the two likelihoods, from their definitions."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.func import grad, vmap

from influence import likelihoods
from influence.likelihoods import Gaussian, Likelihood, Softmax
from tests.influence import validation_oracles as oracles

Loss = Callable[[Tensor, Tensor], Tensor]

KINDS = {
    "softmax": (Softmax(), oracles.cross_entropy),
    "gaussian": (Gaussian(), oracles.half_squared_error),
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def targets_of(kind: str, seed: int, m: int, c: int) -> torch.Tensor:
    if kind == "gaussian":
        return normal(seed, m, c)
    return torch.randint(c, (m,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_both_are_likelihoods(kind):
    assert isinstance(KINDS[kind][0], Likelihood)


def test_the_loss_is_minus_the_log_probability_of_torchs_distributions():
    outputs, classes, values = normal(0, 5, 3), torch.tensor([0, 2, 1, 1, 0]), normal(1, 5, 3)
    torch.testing.assert_close(
        Softmax().loss(outputs, classes), -Categorical(logits=outputs).log_prob(classes)
    )
    constant = 3 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(
        Gaussian().loss(outputs, values) + constant,
        -Normal(outputs, torch.ones(()).double()).log_prob(values).sum(dim=1),
    )


@pytest.mark.parametrize("cached", [1, 21, likelihoods.CACHED])
def test_cross_entropy_and_its_derivatives_are_torchs_however_many_rows_a_block_has(
    cached, monkeypatch
):
    """The gradient, the one of the gradient, and both for many targets at once."""
    monkeypatch.setattr(likelihoods, "CACHED", cached)
    logits, slopes = normal(0, 8, 7), normal(1, 8)
    targets = targets_of("softmax", 2, 8, 7)
    targets[::3] = likelihoods.NO_TARGET

    def torchs(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def derivatives(loss: Loss) -> list[Tensor]:
        at = logits.clone().requires_grad_()
        losses = loss(at, targets)
        [first] = torch.autograd.grad(losses @ slopes, at, create_graph=True)
        [second] = torch.autograd.grad((first * normal(3, 8, 7)).sum(), at)
        both = torch.stack([targets, targets.flip(0)])
        by_target = vmap(grad(lambda t, y: loss(t, y) @ slopes), (None, 0))(logits, both)
        return [losses.detach(), first.detach(), second, by_target]

    for got, wanted in zip(derivatives(Softmax().loss), derivatives(torchs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
        assert wanted.abs().max() > 0.1


def test_half_precision_logits_have_the_float32_gradient_rounded_once():
    """Where p is near 1, p − 1 taken in bfloat16 would be 0."""
    logits = (normal(0, 6, 5) * 3).to(torch.bfloat16)
    logits[:, 2] += 9
    targets = torch.full((6,), 2)

    def slope(x: Tensor, loss: Loss) -> Tensor:
        at = x.clone().requires_grad_()
        return torch.autograd.grad(loss(at, targets).sum(), at)[0]

    wanted = slope(logits.float(), nn.functional.cross_entropy) * len(targets)
    got = slope(logits, Softmax().loss)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-7)


def test_the_way_back_keeps_nothing_as_large_as_the_logits_but_these():
    logits = normal(0, 30, 40).requires_grad_()
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        Softmax().loss(logits, targets_of("softmax", 1, 30, 40)).sum()
    large = [x for x in kept if x.numel() >= logits.numel()]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]


@given(st.sampled_from(list(KINDS)), st.integers(2, 5), st.integers(0, 99))
def test_curvature_times_tangents_is_the_hessian_of_the_loss_times_tangents(kind, c, seed):
    """For any target, and tangents with axes in front."""
    likelihood, loss = KINDS[kind]
    outputs, tangents = 2 * normal(seed, 3, c), normal(seed + 1, 2, 3, c)
    got = likelihood.curvature(outputs, tangents)
    for row, target in enumerate(targets_of(kind, seed, 3, c)):
        H = oracles.loss_hessian(loss, outputs[row], target)
        torch.testing.assert_close(got[:, row], tangents[:, row] @ H, rtol=1e-9, atol=1e-12)


@given(st.sampled_from(list(KINDS)), st.integers(2, 5), st.integers(0, 99))
def test_the_divergence_is_the_bregman_divergence_of_the_loss(kind, c, seed):
    """Eq. 8, which is not symmetric, with a target of its own in every row."""
    likelihood, loss = KINDS[kind]
    after, before = 2 * normal(seed, 3, c), 2 * normal(seed + 1, 3, c)
    got = likelihood.divergence(after, before)
    for row, target in enumerate(targets_of(kind, seed, 3, c)):
        wanted = oracles.bregman(loss, after[row], before[row], target)
        torch.testing.assert_close(got[row], wanted, rtol=1e-9, atol=1e-12)
    assert (got > 0).all()
    assert likelihood.divergence(before, before).abs().max() < 1e-12


def test_the_divergence_by_its_definition_is_the_same_for_every_label():
    """So a single one without labels may stand for it."""
    after, before = normal(0, 4), normal(1, 4)
    found = [
        oracles.bregman(oracles.cross_entropy, after, before, torch.tensor(y)) for y in range(4)
    ]
    torch.testing.assert_close(torch.stack(found), found[0].expand(4), rtol=1e-12, atol=1e-12)


def test_classes_are_drawn_as_often_as_the_model_says():
    n, logits = 40_000, torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Softmax().sample(logits.expand(n, -1), uniform)
    p = logits.softmax(0)
    errors = (drawn.bincount(minlength=4) / n - p).abs() / (p * (1 - p) / n).sqrt()
    assert errors.max() < 4  # standard errors
    assert Softmax().num_uniforms(4) == 1


@pytest.mark.parametrize("cached", [1000, likelihoods.CACHED])
@pytest.mark.parametrize("num_classes", [63, 64, 65, 200])
def test_a_class_is_drawn_where_the_cumulative_sum_passes_the_uniform(
    num_classes, cached, monkeypatch
):
    """However classes and rows are grouped; and none of those that the model excludes."""
    monkeypatch.setattr(likelihoods, "CACHED", cached)
    logits = normal(0, 300, num_classes) * 3
    logits[:, ::7] = -math.inf
    uniform = torch.rand(300, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = Softmax().sample(logits, uniform)
    cumulative = logits.softmax(-1).cumsum(-1)
    wanted = (cumulative <= uniform).sum(-1)
    assert torch.equal(drawn, wanted)
    assert (drawn % 7 != 0).all()
    for end in (0.0, 1 - 2.0**-53):
        ends = Softmax().sample(logits.float(), torch.full((300, 1), end, dtype=torch.float64))
        assert (ends % 7 != 0).all()


def test_values_are_drawn_around_the_outputs_with_unit_variance():
    n, means = 40_000, torch.tensor([3.0, -1.0], dtype=torch.float64)
    uniform = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = Gaussian().sample(means.expand(n, -1), uniform) - means
    assert noise.mean(0).abs().max() < 4 / math.sqrt(n)
    assert (noise.T @ noise / n - torch.eye(2)).abs().max() < 4 * math.sqrt(2 / n)
    assert (noise**4).mean(0).sub(3).abs().max() < 4 * math.sqrt(96 / n)  # normal, not any other
    assert Gaussian().num_uniforms(2) == 2


def test_the_ends_of_the_uniforms_give_finite_draws():
    """Counters give 0 and 1 − 2⁻⁵³ now and then."""
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    drawn = Gaussian().sample(torch.zeros(1, 2, dtype=torch.float64), ends)
    assert drawn.isfinite().all()
    assert drawn[0, 0] < -8
    assert drawn[0, 1] > 8
    assert Softmax().sample(torch.zeros(1, 3).double(), ends[:, :1]).item() == 0
    assert Softmax().sample(torch.zeros(1, 3).double(), ends[:, 1:]).item() == 2
