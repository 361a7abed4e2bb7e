"""What a pass captures, against autograd through the real weights."""

import weakref

import pytest
import torch
from torch import nn

from influence.capture import capture
from influence.examples import Batch
from influence.layers import Layer, find_layers
from influence.objectives import forward, training_loss
from influence.passes import NonFiniteSequenceError, run_pass
from tests import oracles
from tests.influence import models


@pytest.mark.parametrize("case", models.CASES)
def test_captured_gradients_are_autograds_per_sequence_gradients(case):
    """Every kind of layer; sequences of unequal length, so padding; prompts in every second."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    io = models.io_of(model, layers, models.batch(sequences), training_loss)
    for layer in layers:
        for n, sequence in enumerate(sequences):
            wanted = -oracles.sequence_gradient(model, layer.module, sequence)
            torch.testing.assert_close(io[layer.name].gradient()[n], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", models.CASES)
def test_inputs_and_output_gradients_are_what_the_layer_saw_in_each_sequence(case):
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    io = models.io_of(model, layers, models.batch(sequences), training_loss)
    for layer in layers:
        for n, sequence in enumerate(sequences):
            a, ds = oracles.layer_io(model, layer.module, sequence)
            got, length = io[layer.name], len(sequence[0])
            i = layer.d_in - layer.has_bias
            assert got.has_bias == layer.has_bias
            torch.testing.assert_close(got.a[n, :length], a[:, :i], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(got.ds[n, :length], -ds, rtol=1e-9, atol=1e-12)
            assert not got.ds[n, length:].any()  # padding feeds no loss


def test_prompt_positions_carry_gradient_to_the_loss_of_later_tokens():
    model = models.mlp()
    sequence = (torch.tensor([1, 2, 3, 4]), torch.tensor([False, False, False, True]))
    layers = models.attributed(model)
    io = models.io_of(model, layers, models.batch([sequence]), training_loss)
    assert io["block.mlp.fc1"].ds[0, :2].abs().min() > 1e-6


def test_logits_that_the_way_back_does_not_need_are_let_go_before_it():
    """They are the largest of all that a pass holds."""
    alive = []

    def objective(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        logits, losses = weakref.ref(outputs), training_loss(outputs.clone(), batch)
        losses.register_hook(lambda _: alive.append(logits() is not None))
        return losses

    model = models.mlp()
    run_pass(model, models.attributed(model), models.batch(models.corpus()), objective)
    assert alive == [False]


@pytest.mark.parametrize("case", models.CASES)
def test_inputs_told_on_the_way_forward_are_the_captured_ones_and_nobody_keeps_them(case):
    model, batch = models.CASES[case](), models.batch(models.corpus())
    layers = models.attributed(model)
    wanted = run_pass(model, layers, batch, training_loss)
    told: dict[str, torch.Tensor] = {}
    alive, refs = [], []
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0])))

    def objective(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        alive.extend(ref() is not None for ref in refs)
        return training_loss(outputs, batch)

    def hear(layer: Layer, a: torch.Tensor) -> None:
        told[layer.name] = a.clone()

    ios = run_pass(model, layers, batch, objective, hear)
    assert len(alive) == len(layers)
    assert not all(alive)  # what autograd keeps for itself may be a layer's input, as a residual is
    for name, io in ios.items():
        assert torch.equal(told[name], wanted[name].a)
        assert torch.equal(io.ds, wanted[name].ds)
        assert io.a.shape == (*io.ds.shape[:2], 0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_gradient_is_the_sum_over_positions_of_outer_products(has_bias):
    io = models.random_io(0, has_bias=has_bias)
    ones = torch.ones(*io.a.shape[:2], 1, dtype=io.a.dtype)
    a = torch.cat([io.a, ones], dim=2) if has_bias else io.a
    for n in range(len(a)):
        wanted = sum(torch.outer(io.ds[n, t], a[n, t]) for t in range(a.shape[1]))
        torch.testing.assert_close(io.gradient()[n], wanted)


def test_capturing_does_not_change_the_logits():
    model, batch = models.gpt2(), models.batch(models.corpus())
    with capture(model, models.attributed(model)):
        captured = forward(model, batch)
    assert torch.equal(captured, forward(model, batch))


def test_no_weight_gradient_is_formed_and_nothing_flows_below_the_lowest_layer():
    model, batch = models.gpt2(num_layers=2), models.batch(models.corpus())
    layers, _ = find_layers(model, ["*.h.1.mlp.*"])
    flows = {}
    for name in ("transformer.h.0", "transformer.h.1"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: flows.update(
                {name: (out[0] if isinstance(out, tuple) else out).requires_grad}
            )
        )
    with capture(model, layers) as opened:
        opened.backward(training_loss(forward(model, batch), batch).sum())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert flows == {"transformer.h.0": False, "transformer.h.1": True}
    assert all(parameter.grad is None for parameter in model.parameters())


def state(model: nn.Module) -> list[object]:
    """What a capture must leave as it was."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    return [hooks, [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("exception", [None, KeyError])
def test_hooks_and_requires_grad_are_put_back_also_after_an_exception(exception):
    model, batch = models.mlp(), models.batch(models.corpus())
    model.head.bias.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    before = state(model)

    def run():
        with capture(model, models.attributed(model)) as opened:
            logits = forward(model, batch)
            if exception:
                raise exception("in the middle")
            opened.backward(training_loss(logits, batch).sum())

    if exception:
        with pytest.raises(exception):
            run()
    else:
        run()
    assert state(model) == before


def test_a_frozen_model_has_the_same_gradients():
    """Checkpoints for inference come with requires_grad off."""
    model, batch = models.mlp(), models.batch(models.corpus())
    layers = models.attributed(model)
    wanted = models.io_of(model, layers, batch, training_loss)
    got = models.io_of(model.requires_grad_(False), layers, batch, training_loss)
    for name in wanted:
        assert torch.equal(got[name].ds, wanted[name].ds)


def test_one_forward_serves_several_objectives():
    model, batch = models.mlp(), models.batch(models.corpus())
    with capture(model, models.attributed(model)) as opened:
        loss = training_loss(forward(model, batch), batch).sum()
        once = opened.backward(loss, retain_graph=True)
        thrice = opened.backward(3 * loss)
    for name in once:
        torch.testing.assert_close(thrice[name].ds, 3 * once[name].ds)


def test_a_layer_that_runs_twice_in_one_pass_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.once = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.once(self.again(self.again(x)))

    model = Twice().double()
    layers, _ = find_layers(model, ["all"])

    def run():
        with capture(model, layers) as opened:
            opened.backward(model(torch.ones(1, 2, 3, dtype=torch.float64)).sum())

    with pytest.raises(ValueError, match="again"):
        run()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_the_pass_did_not_run_is_absent():
    model = models.mlp()
    model.unused = nn.Linear(2, 2).double()
    layers, _ = find_layers(model, ["all"])
    io = models.io_of(model, layers, models.batch(models.corpus()), training_loss)
    assert set(io) == {layer.name for layer in layers} - {"unused"}


@pytest.mark.parametrize("picked", ["all", "2"])  # in the midst of the graph, and where it begins
@pytest.mark.parametrize("is_view", [True, False])
def test_an_activation_in_place_after_a_layer_is_refused_or_changes_nothing(picked, is_view):
    """Else the captured output would be the one after the ReLU, and its ds too large."""

    class Product(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.mT + self.bias  # no view, unlike nn.Linear's output

    torch.manual_seed(0)
    middle = (nn.Linear if is_view else Product)(4, 4)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), middle, nn.ReLU(), nn.Linear(4, 2)).double()
    in_place = nn.Sequential(*plain[:3], nn.ReLU(inplace=True), plain[4])
    x = torch.randn(2, 3, 3, dtype=torch.float64)

    def gradient(model: nn.Module) -> torch.Tensor:
        with capture(model, find_layers(model, [picked])[0]) as opened:
            return opened.backward(model(x).square().sum())["2"].gradient()

    if is_view and picked == "all":
        with pytest.raises(ValueError, match="'2' is changed in place"):
            gradient(in_place)
    else:
        torch.testing.assert_close(gradient(in_place), gradient(plain))


def test_a_layer_whose_input_is_changed_in_place_afterwards_is_refused_or_sees_the_old_input():
    """Without weight gradients autograd itself no longer objects."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x, in_place):
            h = self.first(x) + 0.0
            s = self.second(h)
            return (h.add_(1.0) if in_place else h + 1.0) + s

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 3, dtype=torch.float64)

    def gradient(in_place: bool) -> torch.Tensor:
        with capture(model, find_layers(model, ["all"])[0]) as opened:
            return opened.backward(model(x, in_place).square().sum())["second"].gradient()

    try:
        got = gradient(True)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(got, gradient(False))


class Rows(nn.Module):
    """Puts `keep` of the rows of all sequences, one below the other, through its layer."""

    def __init__(self, keep: slice = slice(None)) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(models.VOCABULARY, 4), nn.Linear(4, 4)
        self.keep = keep

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        rows = x.flatten(0, 1)
        kept = torch.arange(len(rows))[self.keep]
        rows = rows.index_copy(0, kept, self.layer(rows[kept]))
        return rows.view_as(x).cumsum(1) @ self.embedding.weight.T


def test_rows_that_a_model_flattens_before_a_layer_belong_to_their_sequences():
    model, sequences = models.randomise(Rows(), 0), models.corpus()
    layers = find_layers(model, ["layer"])[0]
    io = models.io_of(model, layers, models.batch(sequences), training_loss)["layer"]
    assert io.a.shape[:2] == models.batch(sequences).tokens.shape
    for n, sequence in enumerate(sequences):
        alone = models.io_of(model, layers, models.batch([sequence]), training_loss)["layer"]
        torch.testing.assert_close(io.gradient()[n], alone.gradient()[0])


def test_a_layer_that_runs_on_other_positions_than_the_batchs_is_refused_by_name():
    """Half of the rows could belong to any sequence; guessing would give each another's."""
    model, batch = models.randomise(Rows(slice(0, None, 2)), 0), models.batch(models.corpus())
    layers = find_layers(model, ["layer"])[0]
    with pytest.raises(ValueError, match=r"'layer' ran on inputs of shape \(12, 4\).*4 × 6"):
        models.io_of(model, layers, batch, training_loss)


def test_an_infinite_activation_among_flattened_rows_is_named_by_its_sequence():
    model, batch = models.randomise(Rows(), 0), models.batch(models.corpus(lengths=(3, 5, 4)))
    with torch.no_grad():
        model.embedding.weight[1] = torch.inf
    batch.tokens[:] = 0
    batch.tokens[2, 1] = 1
    with pytest.raises(NonFiniteSequenceError) as caught:
        run_pass(model, find_layers(model, ["layer"])[0], batch, training_loss)
    assert (caught.value.layer, caught.value.sequence_id) == ("layer", int(batch.ids[2]))
