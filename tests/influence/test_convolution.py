"""A convolution is a linear layer on patches: which patches, in which order, and which are out."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from influence.layers import find_layers, gradients_by_position, inputs_by_position, share_inputs
from influence.objectives import training_loss
from tests.influence import models
from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles

SHAPES = [
    dict(zip(("kernel_size", "stride", "padding", "dilation", "bias"), numbers, strict=True))
    for numbers in [
        (1, 1, 0, 1, True),
        (3, 1, 1, 1, False),
        (3, 2, 1, 1, True),
        ((2, 3), (2, 1), (0, 1), 1, True),
        (2, 1, 2, (2, 1), False),
        ((3, 1), (1, 2), (1, 0), 1, True),
    ]
]


class Picture(nn.Module):
    """One convolution, then a head."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, **shape)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(1))


def picture(shape) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    model = Picture(**shape).double()
    model(images)
    return models.randomise(model, 0), images


@pytest.mark.parametrize("shape", SHAPES)
def test_the_positions_of_an_image_are_the_patches_the_kernel_lies_on(shape):
    model, images = picture(shape)
    layers, _ = find_layers(model, ["conv"])
    with torch.no_grad():
        outputs = model.conv(images)
    a = inputs_by_position(layers[0], images, (len(images),))
    s = gradients_by_position(layers[0], outputs, (len(images),))
    for n, image in enumerate(images):
        wanted = oracles.patches(model.conv, image)
        torch.testing.assert_close(a[n], wanted)
        # The product with the flattened weight is the convolution: the order is the weight's.
        rows = wanted @ model.conv.weight.reshape(3, -1).T
        bias = 0 if model.conv.bias is None else model.conv.bias
        torch.testing.assert_close(s[n], rows + bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_an_image_is_autograds(shape):
    model, images = picture(shape)
    layers, _ = find_layers(model, ["all"])
    labels = torch.tensor([0, 2, 1])
    data: Any = cases.ExampleBatch(torch.arange(3), images, labels, cases.Softmax())
    ios = models.io_of(model, layers, data, training_loss)
    for layer in layers:
        got = ios[layer.name].gradient()
        assert got.shape == (3, layer.d_out, layer.d_in)
        for n in range(3):
            loss = oracles.cross_entropy(model(images[n : n + 1])[0], labels[n])
            wanted = oracles.gradient(loss, [layer.module])
            assert models.relative_error(got[n].flatten(), wanted) < 1e-10


def test_a_convolution_counts_channels_times_kernel_and_the_bias_as_inputs():
    (first, second, head), coverage = find_layers(cases.ConvolutionalNet(), ["all"])
    assert (first.d_out, first.d_in, first.has_bias) == (3, 2 * 3 * 2 + 1, True)
    assert (second.d_out, second.d_in, second.has_bias) == (2, 3 * 2 * 2, False)
    assert (head.d_out, head.d_in) == (3, 5)
    assert coverage.share == 1


@pytest.mark.parametrize(
    "shape",
    [
        {"groups": 2},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_convolutions_whose_patches_are_not_read_are_left_out_with_the_reason(shape):
    model = nn.ModuleDict({"odd": nn.Conv2d(2, 2, 3, **shape), "plain": nn.Conv2d(2, 2, 3)})
    layers, coverage = find_layers(model, ["all"])
    assert [layer.name for layer in layers] == ["plain"]
    (left,) = coverage.left_out
    assert left.name == "odd"
    assert "in groups, or padded other than" in left.reason


def test_two_convolutions_share_an_input_only_when_they_see_the_same_patches():
    """A residual block feeds one tensor to a 3 × 3 and a 1 × 1: their A differ."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(2, 2, 3, padding=1, bias=False)
            self.again = nn.Conv2d(2, 4, 3, padding=1, bias=False)
            self.short = nn.Conv2d(2, 2, 1, bias=False)
            self.strided = nn.Conv2d(2, 2, 1, stride=2, bias=False)

        def forward(self, x):
            return self.wide(x), self.again(x), self.short(x), self.strided(x)

    model = Fork()
    layers = share_inputs(model, find_layers(model, ["all"])[0], torch.zeros(1, 2, 4, 4))
    groups = {layer.name: layer.input_group for layer in layers}
    assert groups["again"] == "wide"
    for one, other in itertools.combinations(["wide", "short", "strided"], 2):
        assert groups[one] != groups[other]
