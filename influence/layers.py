"""Which layers are attributed, which are left out and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Int
from torch import Tensor, nn

ROLES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("*.mlp.*", "*.feed_forward.*", "*.ffn.*", "*.fc1", "*.fc2"),
    "attention": ("*.attn.*", "*.self_attn.*", "*.attention.*"),
    "all": ("*",),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear map s = W̄ [a; 1] (Grosse et al. 2023, Eq. 12); `d_in` counts the 1 of a bias.

    Layers with one `input_group` take the same input, and so share A and Q_A.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    has_bias: bool
    input_group: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A module whose own parameters are not attributed, with the reason."""

    name: str
    num_parameters: int
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the model the scores speak for."""

    attributed: tuple[str, ...]
    num_attributed: int
    num_parameters: int
    left_out: tuple[LeftOut, ...]

    @property
    def share(self) -> float:
        """Attributed parameters / all parameters."""
        return self.num_attributed / self.num_parameters


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear`, or GPT-2's Conv1D (known by name: this package does not import it)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def find_layers(model: nn.Module, patterns: Sequence[str]) -> tuple[tuple[Layer, ...], Coverage]:
    """Layers whose names match any role of `ROLES` or any glob, in the model's order.

    Tied weights (a parameter that two modules hold) are left out: one gradient would then belong
    to two layers.

    Raises:
        ValueError: if a pattern matches no linear layer that can be attributed.
    """
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)

    layers: list[Layer] = []
    left_out: list[LeftOut] = []
    useful: set[str] = set()
    counted: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        num_new = sum(parameter.numel() for parameter in own if parameter not in counted)
        counted.update(own)
        matching = [pattern for pattern in patterns if _matches(name, pattern)]
        tied = sorted({other for p in own for other in holders[p]} - {name})
        if not matching:
            reason = f"tied to {', '.join(tied)}" if tied else "not in `layers`"
        elif tied:
            reason = f"tied to {', '.join(tied)}"
        elif not is_linear(module):
            reason = f"{type(module).__name__} is not a linear layer"
        else:
            layers.append(_layer(name, module))
            useful.update(matching)
            continue
        left_out.append(LeftOut(name, num_new, reason))

    for pattern in patterns:
        if pattern not in useful:
            names = [name for name, module in model.named_modules() if is_linear(module)]
            raise ValueError(
                f"layers: {pattern!r} matches no linear layer that can be attributed; the model's "
                f"linear layers are {', '.join(names[:8])}{', …' if len(names) > 8 else ''}; "
                f"give a glob over these names or one of the roles {', '.join(ROLES)}"
            )
    num_attributed = sum(p.numel() for layer in layers for p in layer.module.parameters())
    num_parameters = sum(p.numel() for p in model.parameters())
    attributed = tuple(layer.name for layer in layers)
    return tuple(layers), Coverage(attributed, num_attributed, num_parameters, tuple(left_out))


def share_inputs(
    model: nn.Module, layers: Sequence[Layer], tokens: Int[Tensor, "n t"]
) -> tuple[Layer, ...]:
    """Put layers that are fed the very same tensor into one `input_group` (q, k, v; gate, up).

    One forward pass on any tokens tells, since the sharing is a property of the code.
    """
    inputs: dict[str, Tensor] = {}

    def watch(name: str):
        def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]  # holding the tensor keeps its identity unique

        return remember

    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()

    first_with: dict[tuple[int, bool], str] = {}
    return tuple(
        replace(
            layer,
            input_group=first_with.setdefault((id(inputs[layer.name]), layer.has_bias), layer.name),
        )
        if layer.name in inputs
        else layer
        for layer in layers
    )


def _matches(name: str, pattern: str) -> bool:
    # The leading dot lets "*.mlp.*" match a model whose first level is already "mlp".
    return any(
        fnmatchcase(f".{name}", glob) or fnmatchcase(name, glob)
        for glob in ROLES.get(pattern, (pattern,))
    )


def _layer(name: str, module: nn.Module) -> Layer:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    d_out, d_in = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    has_bias = bias is not None
    return Layer(name, module, d_in + has_bias, d_out, has_bias, input_group=name)
