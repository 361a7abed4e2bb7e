"""How large a run's model is, from its configuration alone: no weight is read or made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from influence.costs import ModelShape
from influence.layers import find_layers, is_linear, share_inputs
from tasks.checkpoints import cached_snapshot, read_reference
from tasks.models import CausalLM, Unmasked, vocabulary_size, without_weights
from tasks.origin import AdapterCheckpoint, Architecture, FineTuned, HubCheckpoint, Scratch
from tasks.params import RunParams

LOGITS = 4  # tensors of logits at once: themselves, their log-softmax, and the gradients of both
NUMBER = 4  # bytes of a number of the pass that is probed


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model's shape, and what a pass holds.

    Attributes:
        shape: for the arithmetic of costs.
        held: numbers that a pass holds for a token besides the logits.
        context: the longest sequence it reads; None: no limit.
        folder: of the checkpoint; None where it is still to be trained.
    """

    shape: ModelShape
    held: float
    context: int | None
    folder: Path | None

    def pass_bytes(self, itemsize: int) -> float:
        """What a pass holds for a token, with numbers of so many bytes; losses are float32."""
        return self.held * itemsize + LOGITS * self.shape.vocabulary * max(4, itemsize)


def model_folder(params: RunParams, root: Path, train: Path) -> Path | None:
    """Where the run's checkpoint lies now; None for a model that is not trained yet.

    Raises:
        ValueError: a checkpoint of the hub that is not in the local cache; an adapter.
    """
    if (train / "model.json").is_file():
        try:
            return read_reference(train, root).folder
        except ValueError:  # its files are gone; the params may name others
            pass
    if isinstance(params.train, Scratch):
        return None
    if isinstance(params.train, FineTuned):
        return root / params.train.finetune.path
    checkpoint = params.train.checkpoint
    if isinstance(checkpoint, HubCheckpoint):
        return cached_snapshot(checkpoint.hub, checkpoint.revision)
    if isinstance(checkpoint, AdapterCheckpoint):
        raise ValueError("an adapter is not counted in plans yet")
    return root / checkpoint.path


def model_sizes(params: RunParams, root: Path, train: Path, length: int) -> ModelSizes:
    """Sizes of the run's model.

    Args:
        params: of the run.
        root: the checkout.
        train: artifacts/<run>/train, which need not be there.
        length: tokens of a sequence.

    Raises:
        ValueError: no configuration at hand, or a model whose passes depend on numbers.
    """
    folder = model_folder(params, root, train)

    def of(blocks: int | None) -> CausalLM:
        if folder is not None:
            return without_weights(folder, blocks)
        assert isinstance(params.train, Scratch)
        return _untrained(params.train.scratch, blocks)

    model = of(None)
    layers, coverage = find_layers(model, params.layers)
    try:
        probe = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        layers = share_inputs(Unmasked(model), layers, probe)
        kept = _kept_of_all(model, of, length)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be sized without its weights: its passes depend on "
            f"their numbers ({str(error).splitlines()[0]})"
        ) from error
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = ModelShape(
        layers,
        coverage.num_parameters,
        sum(_weight(each).numel() for each in model.modules() if is_linear(each)),
        config.num_hidden_layers * config.num_attention_heads * width,
        vocabulary_size(model),
    )
    # Kept for the backward, and as much again for gradients on their way (tasks/budget.py).
    return ModelSizes(shape, 2 * kept, getattr(config, "max_position_embeddings", None), folder)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _untrained(architecture: Architecture, blocks: int | None) -> CausalLM:
    from tasks.scratch import new_model

    wanted = {} if blocks is None else {"layers": blocks}
    with torch.device("meta"):
        model = new_model(architecture.model_copy(update=wanted), architecture.vocabulary)
    model.config.use_cache = False
    return cast(CausalLM, model.eval().requires_grad_(False))


def _kept_of_all(model: CausalLM, of: Callable[[int | None], CausalLM], length: int) -> float:
    """Of one block and of two: what a further one adds, all others add as well."""
    blocks = model.config.num_hidden_layers
    one = kept_numbers(of(1), length)
    return one if blocks == 1 else one + (blocks - 1) * (kept_numbers(of(2), length) - one)


def kept_numbers(model: CausalLM, length: int) -> float:
    """Numbers a token that autograd keeps of a pass through a model on the device `meta`.

    Fused attention keeps no table of positions by positions; on this device it is not fused, and
    the table is left out.
    """
    own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}  # a tensor held keeps its identity unique

    def keep(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in own and not _is_table(tensor.shape, length):
            kept[_identity(tensor)] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    def begin(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    embedding = cast(nn.Module, model.get_input_embeddings())
    handle = embedding.register_forward_hook(begin)
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Unmasked(model)(tokens)
    finally:
        handle.remove()
    return sum(num_bytes for _, num_bytes in kept.values()) / NUMBER / length


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_table(shape: Sequence[int], length: int) -> bool:
    return len(shape) > 2 and tuple(shape[-2:]) == (length, length)
