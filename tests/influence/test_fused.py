"""A pass runs activations that a model writes out step by step as one kernel."""

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from influence.capture import capture
from influence.fused import fused_activations
from influence.objectives import forward, training_loss
from influence.passes import NonFiniteSequenceError, run_pass
from tests.influence import models

WRITTEN_OUT = [NewGELUActivation, FastGELUActivation]


def of(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_the_kernel_computes_the_same_function_and_derivative(kind):
    model = nn.Sequential(kind())
    x = torch.linspace(-9, 9, 401, dtype=torch.float64, requires_grad=True)
    wanted = model(x)
    [slope] = torch.autograd.grad(wanted.sum(), x)
    with fused_activations(model):
        assert isinstance(model[0], nn.GELU)
        got = model(x)
        [fused_slope] = torch.autograd.grad(got.sum(), x)
    # FastGELU has √(2/π) to ten digits.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(fused_slope, slope, rtol=0, atol=1e-9)


def test_a_pass_uses_it_and_tells_what_the_written_out_one_tells():
    model, batch = models.gpt2(num_layers=2), models.batch(models.corpus())
    layers, seen = models.attributed(model), []
    activations = of(model, NewGELUActivation)
    assert len(activations) == 2  # what GPT-2 is made with

    def watch(module: nn.Module, _: object) -> None:
        seen.append((len(of(module, nn.GELU)), len(of(module, NewGELUActivation))))

    handle = model.register_forward_pre_hook(watch)
    ios = run_pass(model, layers, batch, training_loss)
    handle.remove()
    with capture(model, layers) as captured:
        wanted = captured.backward(training_loss(forward(model, batch), batch).sum())
    assert seen == [(2, 0)]
    for name, io in ios.items():
        torch.testing.assert_close(io.a, wanted[name].a, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(io.ds, wanted[name].ds, rtol=1e-10, atol=1e-13)
    assert of(model, NewGELUActivation) == activations  # the very same modules are back


def test_the_model_is_whole_again_after_a_pass_that_failed():
    model, batch = models.gpt2(), models.batch(models.corpus())
    layers, activations = models.attributed(model), of(model, NewGELUActivation)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)
    with pytest.raises(NonFiniteSequenceError):
        run_pass(model, layers, batch, training_loss)
    assert activations
    assert of(model, NewGELUActivation) == activations


def test_other_activations_stay():
    model = nn.Sequential(nn.GELU(), nn.SiLU(), nn.Tanh())
    before = list(model)
    with fused_activations(model):
        assert list(model) == before
