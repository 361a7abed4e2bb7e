"""Which layers are attributed, which are left out and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.experts import RoutedLinear, routers

ROLES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("*.mlp.*", "*.feed_forward.*", "*.ffn.*", "*.fc1", "*.fc2", "*.experts.*"),
    "attention": ("*.attn.*", "*.self_attn.*", "*.attention.*", "*.self_attention.*"),
    "adapter": ("*.lora_A.*", "*.lora_B.*", "*.modules_to_save.*"),
    "all": ("*",),
}
NARROW = frozenset(ROLES) - {"all"}


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

    @property
    def device(self) -> torch.device:
        """Where its weights are, and so its inputs, its output gradients, and all that is kept of
        it; of one model they may be on several."""
        return next(self.module.parameters()).device

    @property
    def is_routed(self) -> bool:
        """Whether it belongs to an expert, which sees some of the tokens, or none."""
        return isinstance(self.module, RoutedLinear)


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
    """An `nn.Linear`, GPT-2's Conv1D (known by name: this package does not import it), or an
    `nn.Conv2d`, which is linear in the patches that it slides over (Grosse and Martens 2016).

    A router that is an `nn.Linear` by descent goes on to choose, and returns its choice (by name:
    others that descend from it, as Falcon's, compute the same in another way)."""
    if type(module).__name__.endswith("Router"):
        return False
    return isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"


def find_layers(model: nn.Module, patterns: Sequence[str]) -> tuple[tuple[Layer, ...], Coverage]:
    """Layers whose names match any role of `ROLES` or any glob, in the model's order.

    Tied weights (a parameter that two modules hold) are left out: one gradient would then belong
    to two layers. Routers of experts are in no role but `all`.

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
    choosing = routers(model)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        num_new = sum(parameter.numel() for parameter in own if parameter not in counted)
        counted.update(own)
        known = patterns if name not in choosing else [p for p in patterns if p not in NARROW]
        matching = [pattern for pattern in known if _matches(name, pattern)]
        tied = sorted({other for p in own for other in holders[p]} - {name})
        reason = _reason(module, bool(matching), tied)
        if reason is None:
            layers.append(_layer(name, module))
            useful.update(matching)
        else:
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


def _reason(module: nn.Module, matches: bool, tied: Sequence[str]) -> str | None:
    """Why a module with parameters is left out; None if it is attributed."""
    if tied:
        return f"tied to {', '.join(tied)}"
    if not matches:
        return "not in `layers`"
    if not is_linear(module):
        return f"{type(module).__name__} is not a linear layer"
    if isinstance(module, nn.Conv2d) and (
        module.groups > 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return "a convolution in groups, or padded other than by a number of zeros"
    return None


def share_inputs(
    model: nn.Module,
    layers: Sequence[Layer],
    tokens: Int[Tensor, "n t"] | Float[Tensor, "n ..."],
) -> tuple[Layer, ...]:
    """Put layers that are fed the very same tensor into one `input_group` (q, k, v; gate, up).

    One forward pass on any tokens tells, since the sharing is a property of the code.
    """
    inputs: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str):
        def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Holding the tensor keeps its identity unique; its version counts changes in place.
            inputs[name] = args[0], args[0]._version

        return remember

    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()

    seen = {name: (id(tensor), version) for name, (tensor, version) in inputs.items()}
    first_with: dict[tuple[object, ...], str] = {}
    return tuple(
        replace(
            layer,
            input_group=first_with.setdefault(
                (*seen[layer.name], layer.has_bias, *_window(layer)), layer.name
            ),
        )
        if layer.name in seen
        else layer
        for layer in layers
    )


def layer_groups(
    layers: Sequence[Layer], size: Callable[[Sequence[Layer]], int], memory: int
) -> list[tuple[Layer, ...]]:
    """As many layers at a time as a budget holds, in their order; one that is larger is alone.

    Layers with one input stay together, so that what they share is made once.

    Args:
        layers: of one model.
        size: what layers want together; of layers that share no input, the sum of what each wants.
        memory: the budget, in the unit of `size`.
    """
    sharing: dict[str, list[Layer]] = {}
    for layer in layers:
        sharing.setdefault(layer.input_group, []).append(layer)
    groups: list[list[Layer]] = []
    held = 0
    for together in sharing.values():
        wanted = size(together)  # added up: a mixture of experts has layers by the thousand
        if groups and held + wanted <= memory:
            groups[-1] += together
            held += wanted
        else:
            groups.append(together)
            held = wanted
    return [tuple(group) for group in groups]


def _window(layer: Layer) -> tuple[object, ...]:
    """What a convolution makes of its input: two with one input need not see the same patches."""
    module = layer.module
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation


def _matches(name: str, pattern: str) -> bool:
    # The leading dot lets "*.mlp.*" match a model whose first level is already "mlp".
    return any(
        fnmatchcase(f".{name}", glob) or fnmatchcase(name, glob)
        for glob in ROLES.get(pattern, (pattern,))
    )


def _layer(name: str, module: nn.Module) -> Layer:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear | nn.Conv2d):
        d_out, d_in = weight.flatten(1).shape
    else:
        d_in, d_out = weight.shape
    has_bias = bias is not None
    return Layer(name, module, d_in + has_bias, d_out, has_bias, input_group=name)


def inputs_by_position(
    layer: Layer, a: Float[Tensor, "..."], batch: Sequence[int]
) -> Float[Tensor, "n t i"]:
    """Inputs of a layer, by sequence and position.

    A single example has one position; the positions of an image are the patches of a convolution,
    its inputs in the order in which the weight is flattened. A model may also put all sequences'
    positions one below the other before a layer, as OPT does before its MLP.

    Args:
        layer: that ran.
        a: its inputs.
        batch: of the model's input, (sequences, positions) of tokens and (examples,) of others.

    Raises:
        ValueError: naming the layer, if it ran on other positions than those of the batch.
    """
    module = layer.module
    if isinstance(module, nn.Conv2d):
        size, dilation, padding, stride = (
            module.kernel_size, module.dilation, module.padding, module.stride,
        )  # fmt: skip
        assert not isinstance(padding, str)
        return nn.functional.unfold(a, size, dilation, padding, stride).mT
    places = (*batch, 1)[:2]
    if a.ndim == 2 and len(a) == places[0] * places[1]:
        return a.unflatten(0, places)
    if a.ndim != 3 or a.shape[: len(batch)] != tuple(batch):
        raise ValueError(
            f"layer {layer.name!r} ran on inputs of shape {tuple(a.shape)} in a batch of "
            f"{' × '.join(map(str, batch))} positions, so that their sequences cannot be told; "
            "leave this layer out of `layers`"
        )
    return a


def gradients_by_position(
    layer: Layer, ds: Float[Tensor, "..."], batch: Sequence[int]
) -> Float[Tensor, "n t o"]:
    """The gradients of a layer's outputs, by the positions of `inputs_by_position`."""
    if isinstance(layer.module, nn.Conv2d):
        return ds.flatten(2).mT
    return ds.unflatten(0, (*batch, 1)[:2]) if ds.ndim == 2 else ds
