"""How large a run's model is, from its configuration alone: no weight is read or made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from influence.costs import ModelShape
from influence.experts import Experts, separate_experts
from influence.layers import Layer, find_layers, is_linear, share_inputs
from influence.outputhead import PRODUCT, HeadIsNotLastError, without_head
from influence.rowblocks import BY_GPU
from tasks.adapters import add_shapes
from tasks.checkpoints import cached_snapshot, read_reference
from tasks.models import CausalLM, Unmasked, vocabulary_size, without_weights
from tasks.origin import AdapterCheckpoint, Architecture, FineTuned, HubCheckpoint, Scratch
from tasks.params import RunParams

# Tensors of logits at once. In training: themselves, their log-softmax, and the gradients of both.
LOGITS, TRAINING_LOGITS = 2, 4
IN_BLOCK = 4  # tensors of float32 that a block of logits is, where they are made in blocks
NUMBER = 4  # bytes of a number of the pass that is probed


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model's shape, and what a pass holds.

    Attributes:
        shape: for the arithmetic of costs.
        held: numbers that a pass holds for a token besides the logits.
        makes_logits: whether it holds those at all (`influence/outputhead.py`).
        context: the longest sequence it reads; None: no limit.
        folder: of the checkpoint; None where it is still to be trained.
        adapter: of a LoRA adapter beside it, if there is one.
    """

    shape: ModelShape
    held: float
    makes_logits: bool
    context: int | None
    folder: Path | None
    adapter: Path | None = None

    def pass_bytes(self, itemsize: int) -> float:
        """What a pass holds for a token, with numbers of so many bytes; losses are float32."""
        logits = LOGITS * self.shape.vocabulary if self.makes_logits else 0
        return self.held * itemsize + logits * max(4, itemsize)

    def block_bytes(self, on_gpu: bool) -> int:
        """What a pass holds of logits that are made in blocks, however long its batch."""
        block = BY_GPU if on_gpu else PRODUCT
        return 0 if self.makes_logits else IN_BLOCK * 4 * block

    @property
    def training_bytes(self) -> float:
        """What a step of training in float32 holds for a token."""
        return 4 * (self.held + TRAINING_LOGITS * self.shape.vocabulary)


def model_folders(params: RunParams, root: Path, train: Path) -> tuple[Path | None, Path | None]:
    """Where the run's checkpoint lies now, None for a model that is not trained yet; and its
    adapter, if it has one.

    Raises:
        ValueError: a checkpoint of the hub that is not in the local cache.
    """
    if (train / "model.json").is_file():
        try:
            reference = read_reference(train, root)
            return reference.folder, reference.adapter_folder
        except ValueError:  # its files are gone; the params may name others
            pass
    if isinstance(params.train, Scratch):
        return None, None
    if isinstance(params.train, FineTuned):
        return root / params.train.finetune.path, None
    checkpoint = params.train.checkpoint
    if isinstance(checkpoint, HubCheckpoint):
        return cached_snapshot(checkpoint.hub, checkpoint.revision), None
    if isinstance(checkpoint, AdapterCheckpoint):
        return root / checkpoint.base, root / checkpoint.adapter
    return root / checkpoint.path, None


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
    folder, adapter = model_folders(params, root, train)
    model = _shapes(params, folder, adapter)
    layers, coverage = find_layers(model, params.layers)
    # So many that each expert gets as many as any other.
    experts = [1, *(each.num_experts for each in model.modules() if isinstance(each, Experts))]
    tokens = torch.zeros(1, length + -length % max(experts), dtype=torch.int64, device="meta")
    watched = Watched(model, layers)
    try:
        layers = share_inputs(watched, layers, tokens)
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
        sum(
            share * _weight(model.get_submodule(name)).numel()
            for name, share in watched.shares.items()
        ),
        config.num_hidden_layers * config.num_attention_heads * width,
        vocabulary_size(model),
        {each.name: watched.shares[each.name] for each in layers if each.is_routed},
    )
    # Kept for the backward, and as much again for gradients on their way (tasks/budget.py).
    context = getattr(config, "max_position_embeddings", None)
    makes_logits = _makes_logits(model, layers, tokens)
    return ModelSizes(shape, 2 * watched.kept, makes_logits, context, folder, adapter)


def _makes_logits(model: CausalLM, layers: Sequence[Layer], tokens: Tensor) -> bool:
    attributed = [layer.module for layer in layers]
    with torch.no_grad(), without_head(model, attributed) as headless:
        if headless is None:
            return True
        try:
            headless.check(Unmasked(model)(tokens).logits)
        except HeadIsNotLastError:
            return True
    return False


def _shapes(params: RunParams, folder: Path | None, adapter: Path | None) -> CausalLM:
    """The model as passes see it (`tasks.attributed`), on the device `meta`."""
    if folder is not None:
        model = without_weights(folder)
    else:
        assert isinstance(params.train, Scratch)
        model = _untrained(params.train.scratch)
    if adapter is not None:
        add_shapes(model, adapter)
    return cast(CausalLM, separate_experts(model).requires_grad_(False))


def _untrained(architecture: Architecture) -> CausalLM:
    from tasks.scratch import new_model

    with torch.device("meta"):
        model = new_model(architecture, architecture.vocabulary)
    model.config.use_cache = False
    return cast(CausalLM, model.eval())


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


class Watched(nn.Module):
    """A model on the device `meta`, and what its last pass would do and keep elsewhere.

    As in a pass (`influence.capture`), gradients begin at the outputs of the lowest layers.

    Attributes:
        shares: tokens that are multiplied with a matrix ÷ all, by the name of its module.
        kept: numbers a token that autograd keeps. Fused attention keeps no table of positions by
            positions; on this device it is not fused, and the table is left out, unless the model's
            own is not fused either.
    """

    def __init__(self, model: CausalLM, layers: Sequence[Layer]) -> None:
        super().__init__()
        self._model, self._layers = model, layers
        self.shares: dict[str, float] = {}
        self.kept = 0.0

    def forward(self, tokens: Tensor) -> None:
        """Pass; `share_inputs` allows no gradients, without which nothing would be kept."""
        self.shares = {}
        model, length = self._model, tokens.shape[1]
        fused = model.config._attn_implementation != "eager"
        own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, tuple[Tensor, int]] = {}  # a tensor held keeps its identity unique

        def keep(tensor: Tensor) -> Tensor:
            if _identity(tensor) not in own and not (fused and _is_table(tensor.shape, length)):
                kept[_identity(tensor)] = tensor, tensor.untyped_storage().nbytes()
            return tensor

        begins = [each.module.register_forward_hook(_begin) for each in self._layers]
        handles = [*begins, *self._count(length)]
        try:
            with (
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                Unmasked(model)(tokens)
        finally:
            for handle in handles:
                handle.remove()
        self.kept = sum(num_bytes for _, num_bytes in kept.values()) / NUMBER / length

    def _count(self, length: int) -> list[RemovableHandle]:
        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                rows = inputs[0].numel() // inputs[0].shape[-1]
                self.shares[name] = self.shares.get(name, 0.0) + rows / length

            return count

        return [
            each.register_forward_pre_hook(watch(name))
            for name, each in self._model.named_modules()
            if is_linear(each) or _is_router(each)
        ]


def _begin(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _is_router(module: nn.Module) -> bool:
    """Most hold the matrix themselves, and go on to choose."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Router") and isinstance(weight, Tensor)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_table(shape: Sequence[int], length: int) -> bool:
    return len(shape) > 2 and tuple(shape[-2:]) == (length, length)
