"""One forward and backward over a batch, down to each layer's inputs and output gradients."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from influence.capture import LayerIOs, NonFiniteError, OnInput, capture
from influence.examples import Batch
from influence.fused import fused_modules
from influence.layers import Layer
from influence.linearmaps import fast_linear_maps
from influence.objectives import forward, sampled_loss
from influence.outputhead import HeadIsNotLastError, without_head

Objective = Callable[[Float[Tensor, "n ..."], Batch], Float[Tensor, " n"]]


class NonFiniteSequenceError(ValueError):
    """A pass met NaN or infinity; names the layer and the first sequence's id."""

    def __init__(self, layer: str, sequence_id: int) -> None:
        self.layer, self.sequence_id = layer, sequence_id
        super().__init__(
            f"the activations or gradients at layer {layer!r} are NaN or infinite, first in "
            f"sequence id {sequence_id}; check the checkpoint's weights, or run the pass in float32"
        )


def check_finite(numbers: Float[Tensor, " n"], layer: str, batch: Batch) -> None:
    """Stop at the first sequence whose number is not finite: a NaN must not join a sum.

    Raises:
        NonFiniteSequenceError: naming the layer and that sequence.
    """
    if not numbers.isfinite().all():
        row = int((~numbers.isfinite()).nonzero()[0])
        raise NonFiniteSequenceError(layer, int(batch.ids[row]))


def check_finite_layers(
    numbers: Float[Tensor, "n l"], layers: Sequence[Layer], batch: Batch
) -> None:
    """The same for numbers of all layers: one look at them all, since each makes a GPU wait.

    Raises:
        NonFiniteSequenceError: naming the layer and its first sequence.
    """
    if not numbers.isfinite().all():
        for layer, each in zip(layers, numbers.unbind(dim=-1), strict=True):
            check_finite(each, layer.name, batch)


def run_pass(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    objective: Objective,
    on_input: OnInput | None = None,
) -> LayerIOs:
    """`LayerIO` of every layer that ran, for the sum of `objective` over the batch.

    Where `on_input` hears of inputs on the way forward, `a` has no columns (`capture`).

    Raises:
        NonFiniteSequenceError: if an activation is NaN or infinite.
    """
    try:
        return _run(model, layers, batch, objective, on_input)
    except HeadIsNotLastError:  # which this model is known for now; of its inputs all was told
        heard = None if on_input is None else _ignore
        return _run(model, layers, batch, objective, heard)


def _ignore(_layer: Layer, _a: Float[Tensor, "n t i"]) -> None:
    pass


def _run(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    objective: Objective,
    on_input: OnInput | None,
) -> LayerIOs:
    with (
        fused_modules(model),
        fast_linear_maps(model),
        without_head(model, [layer.module for layer in layers]) as headless,
        capture(model, layers, on_input) as captured,
    ):
        outputs = forward(model, batch)
        if headless is not None:
            headless.check(outputs)
            batch = replace(batch, likelihood=headless.likelihood)
        values = objective(outputs, batch.to(outputs.device))
        del outputs  # where they are logits, the largest of all, and no longer needed
        try:
            return captured.backward(values.sum())
        except NonFiniteError as error:
            failed = error
    if on_input is not None:
        run_pass(model, layers, batch, objective)  # keeps the inputs, and so can name the layer
    # Where all layers' inputs are finite, the outputs above them are not.
    row = failed.row if failed.row is not None else int((~values.isfinite()).nonzero()[0])
    raise NonFiniteSequenceError(failed.layer, int(batch.ids[row])) from failed


def pseudo_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    seed: int,
    on_input: OnInput | None = None,
) -> LayerIOs:
    """`LayerIO` whose `ds` are pseudo-gradients: labels sampled from the model (Eq. 13)."""

    def objective(outputs: Float[Tensor, "n ..."], batch: Batch) -> Float[Tensor, " n"]:
        return sampled_loss(outputs, batch, seed)

    return run_pass(model, layers, batch, objective, on_input)
