"""What a model's outputs say of a target: the loss, its curvature, its divergence, its draws.

All work on rows: one row of outputs for each target, whatever example the row belongs to. Both
losses are matching losses, so the Hessian by the outputs does not depend on the target, and the
Gauss-Newton matrix is the Fisher matrix (Grosse et al. 2023, §2.3; Martens 2020).
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from influence.rowblocks import row_blocks

NO_TARGET = -100  # instead of a class: a row without a loss; PyTorch's own number for it
CLASSES = 64  # of a block, of which a draw sees the sum first
# Numbers of a block of rows: what is made of logits is as large as they are, and of one block it
# stays in the cache.
CACHED = 2**18


@runtime_checkable
class Likelihood(Protocol):
    """p(target | outputs), by its negative logarithm in nats."""

    def loss(self, outputs: Float[Tensor, "m c"], targets: Tensor) -> Float[Tensor, " m"]:
        """−log p(target | outputs) of each row, up to a constant."""
        ...

    def sample(self, outputs: Float[Tensor, "m c"], uniform: Float64[Tensor, "m k"]) -> Tensor:
        """A target for each row, drawn from the model by inverse transform of `uniform`."""
        ...

    def num_uniforms(self, num_outputs: int) -> int:
        """How many uniforms (k) a draw of one row takes."""
        ...

    def curvature(
        self, outputs: Float[Tensor, "m c"], tangents: Float[Tensor, "*k m c"]
    ) -> Float[Tensor, "*k m c"]:
        """H_ŷ u: the Hessian of the loss by the outputs, times tangents."""
        ...

    def divergence(
        self, outputs: Float[Tensor, "m c"], before: Float[Tensor, "m c"]
    ) -> Float[Tensor, " m"]:
        """Bregman divergence of the loss between two outputs (Grosse et al. 2023, Eq. 8)."""
        ...


@dataclass(frozen=True, slots=True)
class Softmax:
    """Outputs are logits over classes, a target is a class."""

    def loss(self, outputs: Float[Tensor, "m c"], targets: Tensor) -> Float[Tensor, " m"]:
        """Cross-entropy, in float32 at least; 0, with gradient 0, where there is `NO_TARGET`."""
        losses = _CrossEntropy.apply(outputs, targets)
        assert isinstance(losses, Tensor)
        return losses

    def sample(self, outputs: Float[Tensor, "m c"], uniform: Float64[Tensor, "m k"]) -> Tensor:
        """A class for each row."""
        drawn = []
        for rows in row_blocks(outputs, CACHED):
            logits = wide(outputs[rows])
            weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
            drawn.append(classes(weights, uniform[rows]))
        return torch.cat(drawn)

    def num_uniforms(self, num_outputs: int) -> int:
        """One, however many classes."""
        return 1

    def curvature(
        self, outputs: Float[Tensor, "m c"], tangents: Float[Tensor, "*k m c"]
    ) -> Float[Tensor, "*k m c"]:
        """(diag p − p pᵀ) u."""
        p = outputs.softmax(dim=-1)
        weighted = p * tangents
        return weighted - p * weighted.sum(dim=-1, keepdim=True)

    def divergence(
        self, outputs: Float[Tensor, "m c"], before: Float[Tensor, "m c"]
    ) -> Float[Tensor, " m"]:
        """KL(p_before ‖ p): independent of the labels."""
        old, new = before.log_softmax(dim=-1), outputs.log_softmax(dim=-1)
        return (old.exp() * (old - new)).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Outputs are the means of normal targets with unit variance: squared loss."""

    def loss(self, outputs: Float[Tensor, "m c"], targets: Tensor) -> Float[Tensor, " m"]:
        """½‖ŷ − y‖²."""
        return (outputs - targets).square().sum(dim=-1) / 2

    def sample(self, outputs: Float[Tensor, "m c"], uniform: Float64[Tensor, "m k"]) -> Tensor:
        """ŷ plus standard normal noise."""
        # Half a step of the 53-bit grid keeps 0 from becoming −∞; added to the last step below 1
        # it would round up to 1, and that to ∞.
        return outputs + torch.special.ndtri(uniform.clamp(min=2.0**-54)).to(outputs.dtype)

    def num_uniforms(self, num_outputs: int) -> int:
        """One for each output."""
        return num_outputs

    def curvature(
        self, outputs: Float[Tensor, "m c"], tangents: Float[Tensor, "*k m c"]
    ) -> Float[Tensor, "*k m c"]:
        """u itself."""
        return tangents

    def divergence(
        self, outputs: Float[Tensor, "m c"], before: Float[Tensor, "m c"]
    ) -> Float[Tensor, " m"]:
        """½‖ŷ − ŷ_before‖²."""
        return (outputs - before).square().sum(dim=-1) / 2


class _CrossEntropy(torch.autograd.Function):
    """−log p of each row, of which the way back needs no more than the logits themselves.

    PyTorch's own keeps all log-probabilities and makes two gradients of their size.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Float[Tensor, "m c"], targets: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        return torch.cat(
            [
                nn.functional.cross_entropy(
                    wide(logits[rows]), targets[rows], reduction="none", ignore_index=NO_TARGET
                )
                for rows in row_blocks(logits, CACHED)
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Float[Tensor, "m c"], None]:
        """(p − e_target) times the slope of each row's loss."""
        logits, targets = ctx.saved_tensors
        slope = slopes[0].masked_fill(targets == NO_TARGET, 0).unsqueeze(1)
        target = targets.clamp(min=0).unsqueeze(1)
        any_in_a_batch = logits[:, :1] + slope  # under vmap; what is written to must be so too
        gradient = any_in_a_batch.new_empty(logits.shape, dtype=logits.dtype)
        for rows in row_blocks(logits, CACHED):
            p = wide(logits[rows]).softmax(dim=-1)
            excess = p.scatter_add(1, target[rows], -torch.ones_like(p[:, :1]))
            gradient[rows] = excess * slope[rows]
        return gradient, None


def wide(x: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """In float32 at least, for what is summed over classes."""
    return x.float() if x.dtype.itemsize < 4 else x


def classes(weights: Float[Tensor, "m c"], uniform: Float64[Tensor, "m k"]) -> Int[Tensor, " m"]:
    """A class for each row, in proportion to weights that need not sum to 1."""
    # Inverse transform with sums in float64: rounding must not move a draw over a boundary.
    # First a block of classes is drawn and then a class of it, so that not every class is
    # turned into float64.
    num_classes = weights.shape[-1]
    if missing := -weights.shape[-1] % CLASSES:
        weights = nn.functional.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, CLASSES))
    block, within = _draw(blocks.sum(dim=-1), uniform[:, :1])
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, CLASSES))[:, 0]
    drawn = block * CLASSES + _draw(inside, within)[0]
    return drawn.squeeze(-1).clamp(max=num_classes - 1)


def _draw(
    weights: Float[Tensor, "m c"], uniform: Float64[Tensor, "m 1"]
) -> tuple[Int[Tensor, "m 1"], Float64[Tensor, "m 1"]]:
    """A place in proportion to its weight, and where in [0, 1) of that place the uniform fell."""
    ends = weights.double().cumsum(dim=-1)
    wanted = uniform * ends[:, -1:]
    place = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    weight = weights.gather(1, place).double()
    return place, 1 - (ends.gather(1, place) - wanted) / weight
