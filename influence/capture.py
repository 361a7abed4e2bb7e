"""One pass: layer inputs and output gradients, and no weight gradient anywhere."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from influence.experts import Route
from influence.fused import Origin, origin_of
from influence.layers import Layer, gradients_by_position, inputs_by_position
from influence.products import product, write_product

# Hears the inputs of a layer as soon as it ran; then nobody keeps them.
OnInput = Callable[[Layer, Float[Tensor, "n t i"]], None]


@dataclass(frozen=True, slots=True)
class LayerIO:
    """What a layer saw: inputs `a` (without the 1 of a bias) and output gradients `ds`.

    The gradient of the loss of sequence n is Σ_t ds_nt [a_nt; 1]ᵀ (Grosse et al. 2023, Eq. 14).
    Positions that feed no loss have ds = 0 and add nothing.

    Of an expert, columns are the tokens routed to it, fewer than the positions of the sequence;
    `positions` says which, and is −1 in columns that a sequence does not fill, where a and ds are
    0. Of other layers it is None: every position is there.

    Of a pass that told its inputs on the way forward, `a` has no columns.
    """

    a: Float[Tensor, "n t i"]
    ds: Float[Tensor, "n t o"]
    has_bias: bool
    positions: Int[Tensor, "n t"] | None = None

    def select(self, sequence: int) -> "LayerIO":
        """The part of one sequence."""
        rows = slice(sequence, sequence + 1)
        positions = None if self.positions is None else self.positions[rows]
        return LayerIO(self.a[rows], self.ds[rows], self.has_bias, positions)

    def spread(
        self, columns: Float[Tensor, "q n t"], num_positions: int
    ) -> Float[Tensor, "q n positions"]:
        """Numbers of each column at the positions of the sequence, 0 where none is."""
        if self.positions is None:
            return columns
        into = columns.new_zeros(*columns.shape[:2], num_positions)
        places = self.positions.clamp(min=0).expand(columns.shape)
        return into.scatter_add_(-1, places, columns.masked_fill(self.positions < 0, 0))

    def gradient(self) -> Float[Tensor, "n o d_in"]:
        """Per-sequence gradients Σ_t ds [a; 1]ᵀ, the bias in the last column."""
        if not self.has_bias:
            return product(self.ds.mT, self.a)
        # Both parts go where they belong: joined afterwards they would be copied, and ones beside
        # every activation would cost a copy of `a`.
        (n, _, i), o = self.a.shape, self.ds.shape[2]
        joined = self.ds.new_empty(n, o, i + 1)
        write_product(self.ds.mT, self.a, into=joined[..., :-1])
        torch.sum(self.ds, dim=1, out=joined[..., -1])
        return joined


class LayerIOs(Mapping[str, LayerIO]):
    """One `LayerIO` a layer that ran, by name.

    Those whose inputs are made again (`Origin`) are made each time that they are asked for: asked
    for one after the other, and once each, they cost one layer's inputs, not all layers'.
    """

    def __init__(
        self,
        ios: Mapping[str, LayerIO],
        activations: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._ios, self._activations = ios, activations or {}

    def __getitem__(self, name: str) -> LayerIO:
        io = self._ios[name]
        return replace(io, a=self._activations[name](io.a)) if name in self._activations else io

    def only(self, names: Iterable[str]) -> "LayerIOs":
        """Those of some layers; the others' may be let go."""
        return LayerIOs({name: self._ios[name] for name in names}, self._activations)

    def select(self, sequence: int) -> "LayerIOs":
        """The part of one sequence."""
        ios = {name: io.select(sequence) for name, io in self._ios.items()}
        return LayerIOs(ios, self._activations)

    def __contains__(self, name: object) -> bool:
        return name in self._ios

    def __iter__(self) -> Iterator[str]:
        return iter(self._ios)

    def __len__(self) -> int:
        return len(self._ios)


class Capture:
    """The open pass that `capture` yields; each `backward` returns one `LayerIO` a layer."""

    def __init__(self, layers: Sequence[Layer], on_input: OnInput | None = None) -> None:
        self._layers, self._on_input = layers, on_input
        self._batch: tuple[int, ...] = ()
        self._inputs: dict[str, Tensor | Origin] = {}
        self._watched: dict[str, list[tuple[Tensor, int]]] = {}
        # Places in the graph, not tensors: one of them stays the layer's output also where the
        # model goes on to change the tensor in place, as Falcon does.
        self._outputs: dict[str, GradientEdge] = {}
        self._zeros: dict[str, Callable[[], Tensor]] = {}
        self._routes: dict[str, Route] = {}

    def backward(self, objective: Float[Tensor, ""], retain_graph: bool = False) -> LayerIOs:
        """Differentiate a scalar by the outputs of the layers.

        `retain_graph` allows another backward on the same forward. A layer that the pass did not
        run is absent.

        Raises:
            NonFiniteError: naming the layer, if an activation is NaN or infinite.
            ValueError: naming the layer, if its input was changed in place, or its output where
                that is a view, or if it ran on other positions than those of the batch.
        """
        if not torch.isfinite(objective):
            self._explain_non_finite()
        for name, watched in self._watched.items():
            if any(tensor._version != version for tensor, version in watched):
                raise ValueError(
                    f"the input or output of layer {name!r} is changed in place after the layer "
                    "ran, so its gradient cannot be told; build the model with inplace=False, or "
                    "leave this layer out of `layers`"
                )
        names = list(self._outputs)
        if not names:  # of these layers none ran: idle experts
            return LayerIOs({})
        gradients = torch.autograd.grad(
            objective,
            [self._outputs[name] for name in names],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        by_name = {layer.name: layer for layer in self._layers}
        ios, activations = {}, {}
        for name, ds in zip(names, gradients, strict=True):
            layer = by_name[name]
            ds = self._zeros[name]() if ds is None else ds
            if name in self._routes:
                packed = self._routes[name].pack(self._input(name), ds, self._batch[0])
                ios[name] = LayerIO(*packed[:2], layer.has_bias, packed[2])
                continue
            kept, a = self._inputs.get(name), None  # None: told on the way forward
            if isinstance(kept, Origin):
                # Number by number, and 0 of 0: how they are arranged, or padded, does not matter.
                activations[name], kept = kept.activation, kept.before
            if kept is not None:
                a = inputs_by_position(layer, kept, self._batch)
            ds = gradients_by_position(layer, ds, self._batch)
            ios[name] = LayerIO(ds[..., :0] if a is None else a, ds, layer.has_bias)
        return LayerIOs(ios, activations)

    def _input(self, name: str) -> Tensor:
        kept = self._inputs[name]
        return kept.again() if isinstance(kept, Origin) else kept

    def _explain_non_finite(self) -> None:
        for name in self._inputs:
            a = self._input(name)
            bad = ~torch.isfinite(a).flatten()
            if bad.any():  # sequences come first, also where a model flattens them with positions
                first = int(bad.nonzero()[0])
                if name in self._routes:
                    row = self._routes[name].sequence_of(first // a.shape[1], self._batch[0])
                else:
                    row = first * self._batch[0] // len(bad)
                raise NonFiniteError(name, row)
        raise NonFiniteError("the output head", None)

    def begin(self, inputs: Tensor) -> None:
        """Note how many sequences, and positions of tokens, the model is called with."""
        self._batch = tuple(inputs.shape[:1] if inputs.is_floating_point() else inputs.shape)

    def remember(self, layer: Layer, args: tuple[Any, ...], output: object) -> Tensor:
        """Keep a layer's input and output; the lowest layers' outputs begin the graph.

        Of an expert's layer, the route that its tokens took is its second argument.
        """
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer {layer.name!r} returns {type(output).__name__}, not the tensor of a linear "
                "map; leave this layer out of `layers`"
            )
        a = args[0]
        if layer.name in self._outputs:
            raise ValueError(
                f"layer {layer.name!r} ran twice in one pass: weight sharing is not supported; "
                "leave this layer out of `layers`"
            )
        self._watched[layer.name] = []
        if layer.is_routed:
            self._routes[layer.name] = args[1]
        if self._on_input is not None and not layer.is_routed:
            self._on_input(layer, inputs_by_position(layer, a.detach(), self._batch))
        else:
            # A detached tensor counts the changes of its original: without weight gradients
            # autograd itself no longer objects to them.
            origin = origin_of(a)
            kept = a.detach() if origin is None else origin.before
            self._inputs[layer.name] = kept if origin is None else origin
            self._watched[layer.name].append((kept, kept._version))
        self._zeros[layer.name] = partial(
            torch.zeros, output.shape, dtype=output.dtype, device=output.device
        )
        if output.requires_grad:
            if output._is_view():  # a change in place goes round a view's place in the graph
                counter = output.detach()
                counter.data = output.new_empty(0)  # counts on, and holds nothing
                self._watched[layer.name].append((counter, output._version))
            self._outputs[layer.name] = get_gradient_edge(output)
            return output
        start = output.detach().requires_grad_()
        self._outputs[layer.name] = get_gradient_edge(start)
        return start.clone()  # a leaf itself must not be changed in place


class NonFiniteError(ValueError):
    """An activation is NaN or infinite; `row` is its sequence's place in the batch."""

    def __init__(self, layer: str, row: int | None) -> None:
        where = "" if row is None else f" in row {row} of the batch"
        super().__init__(
            f"the input of layer {layer!r} is NaN or infinite{where}; check the checkpoint, or "
            "run the pass in float32"
        )
        self.layer, self.row = layer, row


@contextmanager
def capture(
    model: nn.Module, layers: Sequence[Layer], on_input: OnInput | None = None
) -> Iterator[Capture]:
    """Open a pass over `model`: run it once inside the block, then call `Capture.backward`.

    Where `on_input` hears of inputs, no layer's are kept for the way back but those of experts.

    No parameter requires a gradient inside the block, so autograd forms no weight gradient, and
    the graph begins at the outputs of the lowest layers, so nothing flows below them. Hooks are
    removed and `requires_grad` is put back when the block ends, also by an exception.
    """
    captured = Capture(layers, on_input)
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []

    def hook(layer: Layer):
        def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> Tensor:
            return captured.remember(layer, args, output)

        return keep

    try:
        for parameter in required:
            parameter.requires_grad_(False)
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook(layer)))
        handles.append(
            model.register_forward_pre_hook(lambda _, args: captured.begin(args[0]), prepend=True)
        )
        with torch.enable_grad():
            yield captured
    finally:
        for handle in handles:
            handle.remove()
        for parameter in required:
            parameter.requires_grad_(True)
