"""A language model's last linear map as part of the likelihood, so that logits never exist at once.

Of 128k classes they are gigabytes, and their gradient as much again: more than all else that a pass
holds. Here they are made for a block of rows, and gone through while they are at hand: the draw of
a label, the loss, and its gradient by the hidden states, which is all that the way back needs. The
products are the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from influence.likelihoods import CACHED, NO_TARGET, Softmax, classes, wide
from influence.products import product, write_product
from influence.rowblocks import row_blocks

# Logits of a block: so many rows that the product with the head is as fast as that of all rows.
PRODUCT = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class HeadSoftmax:
    """Outputs are hidden states h, logits are W h + b, a target is a class."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"] | None

    def logits(self, outputs: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """W h + b of each row."""
        return product(outputs, self.weight.mT, self.bias)

    def loss(
        self,
        outputs: Float[Tensor, "m d"],
        targets: Int[Tensor, " m"],
        uniform: Float64[Tensor, "m 1"] | None = None,
    ) -> Float[Tensor, " m"]:
        """Cross-entropy, in float32 at least; 0, with gradient 0, where there is `NO_TARGET`.

        With `uniform`, of a class that is drawn as `sample` draws it in the place of each target.
        """
        losses = _Loss.apply(outputs, self.weight, self.bias, targets, uniform)
        assert isinstance(losses, Tensor)
        return losses

    def sample(
        self, outputs: Float[Tensor, "m d"], uniform: Float64[Tensor, "m k"]
    ) -> Int[Tensor, " m"]:
        """A class for each row."""
        blocks = row_blocks(outputs, PRODUCT, len(self.weight))
        return torch.cat(
            [Softmax().sample(self.logits(outputs[rows]), uniform[rows]) for rows in blocks]
        )

    def num_uniforms(self, num_outputs: int) -> int:
        """One, however many classes."""
        return 1

    def curvature(
        self, outputs: Float[Tensor, "m d"], tangents: Float[Tensor, "*k m d"]
    ) -> Float[Tensor, "*k m d"]:
        """Wᵀ (diag p − p pᵀ) W u."""
        return Softmax().curvature(self.logits(outputs), tangents @ self.weight.T) @ self.weight

    def divergence(
        self, outputs: Float[Tensor, "m d"], before: Float[Tensor, "m d"]
    ) -> Float[Tensor, " m"]:
        """KL(p_before ‖ p)."""
        return Softmax().divergence(self.logits(outputs), self.logits(before))


class _Loss(torch.autograd.Function):
    """−log p of each row; its gradient Wᵀ(p − e_target) is made while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "m d"],
        weight: Float[Tensor, "c d"],
        bias: Float[Tensor, " c"] | None,
        targets: Int[Tensor, " m"],
        uniform: Float64[Tensor, "m 1"] | None,
    ) -> Float[Tensor, " m"]:
        if any(ctx.needs_input_grad[1:3]):
            raise ValueError("the gradient of the output head is not told here; freeze the model")
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = []
        for rows in row_blocks(hidden, PRODUCT, len(weight)):
            logits = product(hidden[rows], weight.mT, bias)
            draws = None if uniform is None else uniform[rows]
            losses += _losses_and_excess(logits, targets[rows], draws)
            if gradient is not None:
                write_product(logits, weight, into=gradient[rows])
            del logits  # else two blocks' would be there while the next is made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Float[Tensor, "m d"] | None, ...]:
        [gradient], [slope] = ctx.saved_tensors, slopes
        return (slope.to(gradient.dtype).unsqueeze(1) * gradient, None, None, None, None)


def _losses_and_excess(
    logits: Float[Tensor, "m c"],
    targets: Int[Tensor, " m"],
    uniform: Float64[Tensor, "m 1"] | None,
) -> list[Float[Tensor, " _"]]:
    """Losses of blocks of rows; the logits themselves become p − e_target."""
    losses = []
    for rows in row_blocks(logits, CACHED):
        shifted = wide(logits[rows])
        shifted = shifted - shifted.amax(dim=-1, keepdim=True)
        p = shifted.exp()
        total = p.sum(dim=-1, keepdim=True)
        carries = (targets[rows] != NO_TARGET).unsqueeze(1)
        if uniform is None:
            target = targets[rows].clamp(min=0).unsqueeze(1)
        else:
            target = classes(p, uniform[rows]).unsqueeze(1)
        losses.append(((total.log() - shifted.gather(1, target)) * carries).squeeze(1))
        p.div_(total).scatter_add_(1, target, -torch.ones_like(total))
        logits[rows] = p.mul_(carries)
    return losses


class HeadIsNotLastError(Exception):
    """A model does more with its head's outputs than return them: it scales, caps or widens them.

    From then on, `without_head` leaves its head where it is.
    """


_NOT_LAST: WeakSet[nn.Module] = WeakSet()


class _Apart(nn.Module):
    """In the place of an output head: hands hidden states on, as the head would have got them.

    Hooks before the head run here: in a model over several devices they bring its input.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._forward_pre_hooks = head._forward_pre_hooks
        self._forward_pre_hooks_with_kwargs = head._forward_pre_hooks_with_kwargs
        self.seen: Tensor | None = None

    def forward(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        self.seen = hidden
        return hidden


@dataclass(frozen=True, slots=True)
class Headless:
    """What a model without its output head lacks, as the likelihood of what it returns."""

    likelihood: HeadSoftmax
    _model: nn.Module
    _apart: _Apart

    def check(self, outputs: Tensor) -> None:
        """See that the model's outputs are what its head would have been given.

        Raises:
            HeadIsNotLastError: they are not.
        """
        if outputs is not self._apart.seen:
            _NOT_LAST.add(self._model)
            raise HeadIsNotLastError
        self._apart.seen = None


@contextmanager
def without_head(model: nn.Module, attributed: Iterable[nn.Module]) -> Iterator[Headless | None]:
    """Leave a language model's output head out inside the block, where it can be; else yield None.

    It stays where it is attributed itself, and where it is more than a linear map.
    """
    head = None if model in _NOT_LAST else _head(model)
    if head is None or any(module is head for module in attributed):
        yield None
        return
    # No gradient of it is wanted, and `capture`, which says so of others, does not see it.
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    apart = _Apart(head)
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child is head
    ]
    try:
        for parent, name in places:
            setattr(parent, name, apart)
        yield Headless(HeadSoftmax(weight, bias), model, apart)
    finally:
        for parent, name in places:
            setattr(parent, name, head)


def _head(model: nn.Module) -> nn.Linear | None:
    """A plain linear map: one that moves its inputs between devices (accelerate) is none."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return None
    return None if head._forward_hooks else head
