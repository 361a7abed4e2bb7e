"""A loss without logits is the loss with them, and the head stays where it is more than a map."""

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from influence import outputhead
from influence.examples import Batch
from influence.factors import fit_factors
from influence.layers import find_layers
from influence.likelihoods import NO_TARGET, Softmax
from influence.objectives import training_loss
from influence.outputhead import HeadSoftmax, without_head
from influence.passes import NonFiniteSequenceError, run_pass
from tests import oracles
from tests.influence import models

ROWS, WIDTH, CLASSES = 7, 5, 131  # more than one block of classes that a draw sees the sum of


def some_head(dtype: torch.dtype, bias: bool) -> HeadSoftmax:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, bias=bias).to(dtype)
    return HeadSoftmax(head.weight.detach(), head.bias.detach() if bias else None)


@pytest.fixture(params=[1, 2 * CLASSES, 2**20])
def blocks(request, monkeypatch):
    """Rows of a block: one, two, and all."""
    monkeypatch.setattr(outputhead, "PRODUCT", request.param)
    monkeypatch.setattr(outputhead, "CACHED", max(1, request.param // 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_loss_gradient_and_draws_are_those_of_all_logits(blocks, bias, drawn):
    head = some_head(torch.float64, bias)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(CLASSES, (ROWS,)).index_fill(0, torch.tensor([0, 4]), NO_TARGET)
    uniform = torch.rand(ROWS, 1, dtype=torch.float64)
    logits = torch.log_softmax(hidden @ head.weight.T + (head.bias if bias else 0), dim=-1)
    wanted_targets = targets
    if drawn:
        assert torch.equal(head.sample(hidden.detach(), uniform), Softmax().sample(logits, uniform))
        wanted_targets = Softmax().sample(logits.detach(), uniform)
    carries = targets != NO_TARGET
    wanted = -logits[torch.arange(ROWS), wanted_targets] * carries
    losses = head.loss(hidden, targets, uniform if drawn else None)
    torch.testing.assert_close(losses, wanted)
    slopes = torch.randn(ROWS, dtype=torch.float64)
    [told] = torch.autograd.grad((slopes * losses).sum(), hidden)
    [found] = torch.autograd.grad((slopes * wanted).sum(), hidden)
    torch.testing.assert_close(told, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_lose_what_narrow_logits_lose(dtype):
    head = some_head(dtype, bias=True)
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(CLASSES, (ROWS,))
    losses = head.loss(hidden, targets)
    assert losses.dtype == torch.float32
    wanted = Softmax().loss(head.logits(hidden), targets)
    torch.testing.assert_close(losses, wanted)
    [told] = torch.autograd.grad(losses.sum(), hidden)
    [found] = torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(told, found)


def test_curvature_and_divergence_are_autograds():
    head = some_head(torch.float64, bias=True)
    hidden, before = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    u = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    target = torch.tensor([5])

    def loss(h: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(h @ head.weight.T + head.bias, -1)[0, target].sum()

    hessian = torch.autograd.functional.hessian(loss, hidden)
    torch.testing.assert_close(head.curvature(hidden, u), u @ hessian[0, :, 0])
    p = torch.log_softmax(before @ head.weight.T + head.bias, -1)
    q = torch.log_softmax(hidden @ head.weight.T + head.bias, -1)
    wanted = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(head.divergence(hidden, before), wanted)


def test_a_head_that_trains_is_refused():
    head = nn.Linear(WIDTH, CLASSES)
    hidden = torch.randn(ROWS, WIDTH)
    with pytest.raises(ValueError, match="freeze"):
        HeadSoftmax(head.weight, None).loss(hidden, torch.zeros(ROWS, dtype=torch.int64))


# ---- in a pass


def widths(model: nn.Module, layers, batch) -> list[int]:
    """Of the outputs that an objective is given."""
    seen = []

    def objective(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append(outputs.shape[-1])
        return training_loss(outputs, batch)

    run_pass(model, layers, batch, objective)
    return seen


@pytest.mark.parametrize("case", [models.gpt2, models.llama])
def test_a_pass_makes_no_logits_and_puts_the_head_back(case):
    model, batch = case(), models.batch(models.corpus())
    layers, head = find_layers(model, ["mlp"])[0], model.get_output_embeddings()
    assert widths(model, layers, batch) == [head.in_features]
    assert model.get_output_embeddings() is head
    assert model(batch.tokens).logits.shape[-1] == models.VOCABULARY


def test_a_head_that_is_attributed_stays():
    model, batch = models.llama(), models.batch(models.corpus())
    layers, _ = find_layers(model, ["lm_head"])
    assert widths(model, layers, batch) == [models.VOCABULARY]


@pytest.mark.parametrize("what", ["hook", "device", "kind"])
def test_a_head_that_does_more_than_a_linear_map_stays(what):
    class Capped(nn.Linear):
        def forward(self, input):
            return super().forward(input).tanh()

    model, batch = models.llama(), models.batch(models.corpus())
    layers, _ = find_layers(model, ["mlp"])
    if what == "hook":
        model.lm_head.register_forward_hook(lambda *_: None)
    elif what == "device":
        model.lm_head._hf_hook = object()
    else:
        capped = Capped(8, models.VOCABULARY, bias=False).double()
        model.lm_head = capped
    assert widths(model, layers, batch) == [models.VOCABULARY]


def test_what_a_hook_makes_of_the_heads_input_is_what_its_loss_gets():
    model, batch = models.llama(), models.batch(models.corpus())
    layers, _ = find_layers(model, ["mlp"])
    model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert widths(model, layers, batch) == [model.lm_head.in_features]
    told = run_pass(model, layers, batch, training_loss)
    model.lm_head.register_forward_hook(lambda *_: None)  # which keeps the head where it is
    wanted = run_pass(model, layers, batch, training_loss)
    for layer in layers:
        torch.testing.assert_close(told[layer.name].ds, wanted[layer.name].ds)


class Scaled(GPT2LMHeadModel):
    """As Cohere and Granite: logits are scaled after the head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def scaled() -> nn.Module:
    return models.randomise(Scaled(models.gpt2().config), 0)


def test_of_a_model_that_goes_on_with_logits_the_head_stays_after_one_more_forward():
    model, batch = scaled(), models.batch(models.corpus())
    layers, _ = find_layers(model, ["mlp"])
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert widths(model, layers, batch) == [models.VOCABULARY]
    assert len(forwards) == 2
    assert widths(model, layers, batch) == [models.VOCABULARY]
    assert len(forwards) == 3


def test_its_inputs_are_told_once():
    model, batch = scaled(), models.batch(models.corpus())
    layers, _ = find_layers(model, ["mlp"])
    heard: list[str] = []
    run_pass(model, layers, batch, training_loss, lambda layer, _: heard.append(layer.name))
    assert sorted(heard) == sorted(layer.name for layer in layers)


def test_its_factors_count_each_input_once():
    model, sequences = scaled(), models.corpus()
    layers, _ = find_layers(model, ["mlp"])
    fresh = fit_factors(model, layers, [models.batch(sequences)], 0)
    known = fit_factors(model, layers, [models.batch(sequences)], 0)
    for layer in layers:
        first, second = fresh.of(layer), known.of(layer)
        assert first.A.num_tokens == second.A.num_tokens
        torch.testing.assert_close(first.A.sum, second.A.sum, rtol=0, atol=0)
        torch.testing.assert_close(first.S.sum, second.S.sum, rtol=0, atol=0)


def test_its_gradients_are_those_of_scaled_logits():
    model, sequences = scaled(), models.corpus()
    layers, _ = find_layers(model, ["mlp"])
    ios = run_pass(model, layers, models.batch(sequences), training_loss)
    for at, z in enumerate(sequences):
        log_p = oracles.log_probability(model, z)
        for layer in layers:
            [wanted] = torch.autograd.grad(-log_p, [layer.module.weight], retain_graph=True)
            told = ios[layer.name].select(at).gradient()[0, :, :-1]
            torch.testing.assert_close(told.mT, wanted)


def test_the_head_is_back_after_a_pass_that_failed():
    model, batch = models.llama(), models.batch(models.corpus())
    head = model.lm_head
    with torch.no_grad():
        head.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteSequenceError, match="output head"):
        run_pass(model, find_layers(model, ["mlp"])[0], batch, training_loss)
    assert model.lm_head is head
    with without_head(model, ()):
        assert model.lm_head is not head
    assert model.lm_head is head
