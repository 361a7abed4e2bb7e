"""A pass runs activations that a model writes out step by step as one kernel."""

import weakref
from importlib import import_module

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from influence import fused
from influence.capture import capture
from influence.examples import Batch
from influence.fused import _RMSNormalised, fused_modules, origin_of
from influence.layers import find_layers
from influence.objectives import forward, training_loss
from influence.passes import NonFiniteSequenceError, run_pass
from influence.selfinfluence import SelfInfluence
from influence.streaming import stream_all
from tests.influence import models
from tests.influence.test_scores import some_queries
from tests.influence.test_selfinfluence import DAMPING, any_solvers

WRITTEN_OUT = [NewGELUActivation, FastGELUActivation]


def of(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_the_kernel_computes_the_same_function_and_derivative(kind):
    model = nn.Sequential(kind())
    x = torch.linspace(-9, 9, 401, dtype=torch.float64, requires_grad=True)
    wanted = model(x)
    [slope] = torch.autograd.grad(wanted.sum(), x)
    with fused_modules(model):
        assert isinstance(model[0], nn.GELU)
        got = model(x)
        [fused_slope] = torch.autograd.grad(got.sum(), x)
    # FastGELU has √(2/π) to ten digits.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(fused_slope, slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cached", [1, 100, fused.CACHED])
@pytest.mark.parametrize("place", sorted(fused.RMS_NORMS))
def test_rows_are_normalised_as_transformers_does_it(place, cached, monkeypatch):
    """Bit for bit on the way forward; heads have an axis more, and lie apart in memory."""
    monkeypatch.setattr(fused, "CACHED", cached)
    kind = getattr(import_module(place[0]), place[1])
    model = nn.Sequential(kind(6)).requires_grad_(False)
    model[0].weight.copy_(torch.linspace(-1, 2, 6))
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 0), (torch.bfloat16, 0.05)):
        at = x.to(dtype).requires_grad_()
        model.to(dtype)
        slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = model(at)
        [wanted_slope] = torch.autograd.grad(wanted, at, slope)
        with fused_modules(model):
            assert type(model[0]) is not kind
            got = model(at)
            [got_slope] = torch.autograd.grad(got, at, slope)
        assert type(model[0]) is kind
        assert torch.equal(got, wanted)
        torch.testing.assert_close(got_slope, wanted_slope, rtol=tolerance, atol=tolerance)


def test_the_slope_of_normalised_rows_is_that_of_differences():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RMSNormalised.apply(x, weight, 1e-3), x)


def test_weights_that_train_are_refused():
    weight = torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match="freeze"):
        _RMSNormalised.apply(torch.ones(2, 5), weight, 1e-3)


def test_a_norm_that_moves_its_inputs_between_devices_stays():
    model = nn.Sequential(LlamaRMSNorm(4))
    model[0]._hf_hook = object()
    with fused_modules(model):
        assert isinstance(model[0], LlamaRMSNorm)


def test_a_pass_over_a_llama_tells_what_the_written_out_one_tells():
    model, batch = models.llama(num_layers=2).float(), models.batch(models.corpus())
    layers = models.attributed(model)
    ios = run_pass(model, layers, batch, training_loss)
    with capture(model, layers) as captured:
        wanted = captured.backward(training_loss(forward(model, batch), batch).sum())
    for name, io in ios.items():
        torch.testing.assert_close(io.a, wanted[name].a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(io.ds, wanted[name].ds, rtol=1e-5, atol=1e-6)


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


class Scaled(nn.Module):
    """An MLP that changes what its activation makes, or was made from, in place or not."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(3, 5), NewGELUActivation(), nn.Linear(5, 3)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.up(x)
        after = self.act(before)
        if self.step == "after":
            after.mul_(2)
        if self.step == "before":
            before.detach().mul_(2)
        return self.down(after * 2 if self.step == "new" else after)


@pytest.mark.parametrize("step", ["none", "after", "before", "new"])
def test_an_activation_is_made_again_for_the_way_back_unless_it_was_changed(step):
    model = Scaled(step).double()
    layers, _ = find_layers(model, ["*"])
    kept, x = [], torch.randn(2, 4, 3, dtype=torch.float64)
    handle = model.down.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    origins: list[object] = []
    model.down.register_forward_pre_hook(lambda _, args: origins.append(origin_of(args[0])))
    with fused_modules(model), capture(model, layers) as captured:
        outputs = model(x)
        assert (origins[0] is not None) == (step == "none")
        if step == "before":
            with pytest.raises(RuntimeError, match="inplace"):  # autograd's own
                captured.backward(outputs.sum())
            return
        ios = captured.backward(outputs.sum())
    torch.testing.assert_close(ios["down"].a, kept[0])


def test_a_pass_keeps_no_activation_that_it_can_make_again():
    model, batch = models.gpt2(num_layers=2), models.batch(models.corpus())
    alive, refs = [], []
    for module in of(model, nn.Module):
        if type(module).__name__ == "GPT2MLP":
            down = module.get_submodule("c_proj")
            down.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0])))

    def objective(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        alive.extend(ref() is not None for ref in refs)
        return training_loss(outputs, batch)

    run_pass(model, models.attributed(model), batch, objective)
    assert alive == [False, False]


@pytest.fixture
def made(monkeypatch) -> list[torch.Size]:
    """Shapes of the activations that were computed, as they are."""
    shapes: list[torch.Size] = []
    forward = nn.GELU.forward

    def counted(self: nn.GELU, x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(nn.GELU, "forward", counted)
    return shapes


def test_an_activation_is_made_again_where_its_layer_is_asked_for_and_not_before(made):
    model, batch = models.gpt2(num_layers=2), models.batch(models.corpus())
    layers = models.attributed(model)
    ios = run_pass(model, layers, batch, training_loss)
    down = "transformer.h.1.mlp.c_proj"
    assert set(ios) == {layer.name for layer in layers}
    assert down in ios
    assert "transformer" not in ios
    few, row = ios.only([down]), ios.select(1)
    assert list(few) == [down]
    assert len(made) == 2  # on the way forward
    a, ds = ios[down].a, ios[down].ds
    assert len(made) == 4
    torch.testing.assert_close(few[down].a, a, rtol=0, atol=0)
    torch.testing.assert_close(row[down].a, a[1:2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(row[down].ds, ds[1:2], rtol=0, atol=0)
    assert made[-1][0] == 1  # of one sequence, not of the batch
    with pytest.raises(KeyError):
        few["transformer.h.0.mlp.c_proj"]


def test_scores_and_self_influence_share_what_is_made_again(made):
    model, batch = models.gpt2(num_layers=2), models.batch(models.corpus())
    layers = models.attributed(model)
    selves = SelfInfluence(any_solvers(layers), DAMPING)
    list(stream_all(model, layers, some_queries(layers, 1), [batch], selves=selves))
    assert len(made) == 4


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
    with fused_modules(model):
        assert list(model) == before
