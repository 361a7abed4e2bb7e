"""The networks of the benchmarks, with PyTorch's usual random weights for a seed."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.sequences import TokenBatch
from tasks.scratch import new_gpt2
from tasks.seeded import seeded
from tasks.validation.datasets import Splits
from tasks.validation.settings import Network, Perceptron, ResNet, Transformer

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
WIDTHS = (16, 32, 64)  # channels of the three stages (He et al. 2016, §4.2)


def build(network: Network, splits: Splits, dtype: torch.dtype, seed: int) -> nn.Module:
    """A new network for the data, in evaluation mode.

    A network of one seed has the same weights in every dtype, up to rounding. The generator that
    everything else draws from is left as it was.

    Args:
        network: which.
        splits: the data; its shapes are those of the first and last layer.
        dtype: of the weights.
        seed: of the weights.

    Raises:
        ValueError: a network that cannot be built, or not for these data.
    """
    if isinstance(network, Transformer):
        model = _transformer(network, splits, seed)
    else:
        with seeded(seed):
            shape = splits.train.inputs.shape[1:]
            if isinstance(network, Perceptron):
                model = _perceptron(network, shape, splits.num_outputs)
            else:
                model = _residual(network, shape, splits.num_outputs)
    return model.to(dtype).eval()


def _perceptron(network: Perceptron, shape: torch.Size, num_outputs: int) -> nn.Sequential:
    widths = [shape.numel(), *network.widths]
    modules: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out), ACTIVATIONS[network.activation]()]
    return nn.Sequential(*modules, nn.Linear(widths[-1], num_outputs))


def _residual(network: ResNet, shape: torch.Size, num_outputs: int) -> "ResidualNetwork":
    num_blocks, rest = divmod(network.resnet - 2, 6)
    if rest:
        raise ValueError(
            f"network.resnet is {network.resnet}; the depth of a residual network for small "
            "images is 6n + 2, such as 20"
        )
    if len(shape) != 3:
        raise ValueError(f"network.resnet wants images, not examples of shape {list(shape)}")
    return ResidualNetwork(shape[0], num_blocks, num_outputs)


def _transformer(network: Transformer, splits: Splits, seed: int) -> nn.Module:
    if not isinstance(splits.train, TokenBatch):
        raise ValueError("network.blocks: a transformer wants text (data.text)")
    if network.width % network.heads:
        raise ValueError(
            f"network.width {network.width} does not split into network.heads {network.heads}; "
            "take a multiple of it"
        )
    return new_gpt2(
        vocabulary=splits.num_outputs,
        context=splits.train.tokens.shape[1],
        blocks=network.blocks,
        width=network.width,
        heads=network.heads,
        hidden=network.hidden,
        seed=seed,
    )


class ResidualNetwork(nn.Module):
    """The residual network for small images of He et al. 2016, §4.2, with 6n + 2 layers.

    Args:
        channels: of an image.
        num_blocks: n, of each of the three stages.
        num_outputs: classes.
    """

    def __init__(self, channels: int, num_blocks: int, num_outputs: int) -> None:
        super().__init__()
        self.conv = _convolution(channels, WIDTHS[0], stride=1)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        blocks, width = [], WIDTHS[0]
        for stage, wider in enumerate(WIDTHS):
            for place in range(num_blocks):
                blocks.append(ResidualBlock(width, wider, 2 if stage and not place else 1))
                width = wider
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits of the classes."""
        x = self.blocks(self.norm(self.conv(images)).relu())
        return self.head(x.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut.

    The shortcut has no parameters: where the block halves the image and widens the channels, it
    takes every second pixel and fills up with zeros (option A of He et al. 2016).
    """

    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(width, wider, stride)
        self.norm1 = nn.BatchNorm2d(wider)
        self.conv2 = _convolution(wider, wider, stride=1)
        self.norm2 = nn.BatchNorm2d(wider)
        self.stride, self.added = stride, wider - width

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The block's output."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + shortcut).relu()


def _convolution(width: int, wider: int, stride: int) -> nn.Conv2d:
    """3 × 3, without a bias: the batch norm after it has one."""
    return nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
