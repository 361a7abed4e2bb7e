"""A model's linear maps while its weights are frozen, multiplied by `product`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.experts import RoutedLinear
from influence.products import prefers_onednn, product, suits_onednn

CONV1D = "transformers.pytorch_utils", "Conv1D"  # by name: this package does not know transformers


class _FrozenLinear(torch.autograd.Function):
    """W x + b of rows, whose weights get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch i"],
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, " o"] | None,
    ) -> Float[Tensor, "*batch o"]:
        ctx.save_for_backward(weight)
        return product(x, weight.mT, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Float[Tensor, "*batch i"], None, None]:
        [weight], [slope] = ctx.saved_tensors, slopes
        return product(slope, weight), None, None


@contextmanager
def fast_linear_maps(model: nn.Module) -> Iterator[None]:
    """Have a model's linear layers multiply by `product` inside the block.

    Those whose weights want a gradient, and those whose `forward` somebody else has replaced
    (accelerate does), run as they are.
    """
    replaced = [
        (module, forward)
        for module in (model.modules() if prefers_onednn() else ())
        if "forward" not in vars(module) and (forward := _fast(module)) is not None
    ]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, _ in replaced:
            del module.forward


def _fast(module: nn.Module) -> Callable[..., Tensor] | None:
    kind = type(module)
    if kind.forward is nn.Linear.forward or kind is RoutedLinear:
        return partial(_forward, module, False)
    if (kind.__module__, kind.__name__) == CONV1D:
        return partial(_forward, module, True)
    return None


def _forward(module: Any, is_transposed: bool, x: Tensor, *route: object) -> Tensor:
    weight, bias = module.weight.mT if is_transposed else module.weight, module.bias
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or not suits_onednn(x, weight.mT):
        return type(module).forward(module, x, *route)
    output = _FrozenLinear.apply(x, weight, bias)
    assert isinstance(output, Tensor)
    return output
