"""The benchmarks' networks: their sizes, their seeds, and that they can be differentiated."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from influence.examples import Batch, ExampleBatch
from influence.layers import find_layers
from influence.likelihoods import Gaussian, Softmax
from influence.objectives import forward, training_loss
from influence.sequences import TokenBatch
from tasks.validation.datasets import Splits
from tasks.validation.networks import build
from tasks.validation.settings import Network, Perceptron, ResNet, Transformer

MLP = Perceptron(widths=(6, 5), activation="tanh")
RESNET = ResNet(resnet=8)
GPT2 = Transformer(blocks=2, width=8, heads=2, hidden=12)


def same_in_all_parts(batch: Batch, num_outputs: int) -> Splits:
    return Splits(batch, batch, batch, num_outputs)


def rows() -> Splits:
    inputs, targets = torch.randn(7, 3).double(), torch.randn(7, 1).double()
    return same_in_all_parts(ExampleBatch(torch.arange(7), inputs, targets, Gaussian()), 1)


def images(channels: int = 1) -> Splits:
    inputs, targets = torch.randn(7, channels, 8, 8).double(), torch.arange(7)
    return same_in_all_parts(ExampleBatch(torch.arange(7), inputs, targets, Softmax()), 10)


def text() -> Splits:
    supervised = torch.ones(7, 6, dtype=torch.bool)
    supervised[:, 0] = False
    tokens = torch.randint(0, 20, (7, 6))
    return same_in_all_parts(TokenBatch(torch.arange(7), tokens, supervised), 20)


CASES = pytest.mark.parametrize(
    ("network", "splits"),
    [(MLP, rows), (MLP, images), (RESNET, lambda: images(3)), (GPT2, text)],
    ids=["rows", "flattened", "resnet", "gpt2"],
)


def plain(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@CASES
def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(network, splits):
    splits = splits()
    before = torch.random.get_rng_state()
    first, again, other = (build(network, splits, torch.float64, seed) for seed in (0, 0, 1))
    assert torch.random.get_rng_state().equal(before)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert any(not states[0][name].equal(states[2][name]) for name in states[0])
    assert not first.training


@CASES
def test_the_outputs_have_a_loss_for_every_example(network: Network, splits):
    splits = splits()
    model = build(network, splits, torch.float64, 0)
    outputs = forward(model, splits.train)
    assert outputs.shape[-1] == splits.num_outputs
    assert outputs.dtype == torch.float64
    assert training_loss(outputs, splits.train).isfinite().all()


@CASES
def test_every_kind_of_derivative_is_right(network: Network, splits):
    """Forward mode, side by side, against central differences: what curvature products take."""
    inputs = splits().train.inputs
    model = build(network, splits(), torch.float64, 0)
    at = {name: value.detach() for name, value in model.named_parameters()}
    along = {name: torch.randn(2, *value.shape).double() for name, value in at.items()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return plain(functional_call(model, parameters, (inputs,)))

    def product(direction: dict[str, Tensor]) -> Tensor:
        return jvp(outputs, (at,), (direction,))[1]

    step = 1e-6
    for place, tangent in enumerate(vmap(product)(along)):
        ahead, behind = (
            outputs({name: at[name] + sign * along[name][place] for name in at})
            for sign in (step, -step)
        )
        torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-5)


@CASES
def test_models_and_inputs_can_stand_side_by_side(network: Network, splits):
    inputs = splits().train.inputs
    models = [build(network, splits(), torch.float64, seed) for seed in (0, 1)]
    stacked = {
        name: torch.stack([model.get_parameter(name).detach() for model in models])
        for name, _ in models[0].named_parameters()
    }
    own = torch.stack([inputs, inputs.flip(0)])
    both = vmap(lambda p, x: plain(functional_call(models[0], p, (x,))))(stacked, own)
    for place, model in enumerate(models):
        torch.testing.assert_close(both[place], plain(model(own[place])))


@CASES
def test_its_linear_layers_can_be_attributed(network: Network, splits):
    model = build(network, splits(), torch.float64, 0)
    layers, coverage = find_layers(model, ["all"] if network is not GPT2 else ["mlp"])
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == (4 if network is GPT2 else len(linear))
    assert not [left for left in coverage.left_out if "convolution" in left.reason]


def test_the_resnet_of_the_paper_has_its_number_of_parameters():
    """0.27 M for depth 20 (He et al. 2016, Table 6)."""
    model = build(ResNet(resnet=20), images(3), torch.float32, 0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_gpt2_has_the_sizes_asked_for_and_no_dropout():
    model = build(GPT2, text(), torch.float32, 0)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes["transformer.wte.weight"] == (20, 8)
    assert shapes["transformer.wpe.weight"] == (6, 8)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (8, 12)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize(
    ("network", "splits", "told"),
    [
        (ResNet(resnet=21), images, r"6n \+ 2"),
        (RESNET, rows, "wants images"),
        (GPT2, rows, "wants text"),
        (Transformer(blocks=1, width=8, heads=3, hidden=8), text, "does not split"),
    ],
)
def test_a_network_that_does_not_fit_is_told(network: Network, splits, told: str):
    with pytest.raises(ValueError, match=told):
        build(network, splits(), torch.float64, 0)


@pytest.mark.parametrize("network", [MLP, RESNET, GPT2], ids=["mlp", "resnet", "gpt2"])
def test_threads_that_build_at_once_do_not_draw_from_each_other(network):
    """Seeds of a benchmark are shards, and shards are threads."""
    splits = text() if network is GPT2 else images() if network is RESNET else rows()

    def first_weights(seed: int) -> list[Tensor]:
        return [p.detach() for p in build(network, splits, torch.float64, seed).parameters()]

    alone = {seed: first_weights(seed) for seed in range(4)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(first_weights, [*range(4)] * 8))
    for place, weights in enumerate(together):
        for got, wanted in zip(weights, alone[place % 4], strict=True):
            assert torch.equal(got, wanted)
