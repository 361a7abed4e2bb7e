"""What a model writes out step by step, run as one kernel or in blocks that stay in the cache.

transformers' NewGELU (GPT-2, GPT-Neo, GPT-J, Phi and others) goes over its input eight times, and
over more on the way back: an eighth of a training step of GPT-2. PyTorch's kernel computes the same
function (Hendrycks and Gimpel 2016, the form with tanh) up to rounding. Its RMSNorm (Llama, Qwen
and others) goes over its input six times, and over more on the way back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.rowblocks import row_blocks

# By name: this package does not know transformers.
WRITTEN_OUT = {
    ("transformers.activations", "NewGELUActivation"),
    ("transformers.activations", "FastGELUActivation"),
}
RMS_NORMS = {
    (f"transformers.models.{family}.modeling_{family}", f"{name}RMSNorm")
    for family, name in {
        "deepseek_v3": "DeepseekV3", "glm4": "Glm4", "granite": "Granite", "llama": "Llama",
        "mistral": "Mistral", "mixtral": "Mixtral", "olmoe": "Olmoe", "phi3": "Phi3",
        "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
        "smollm3": "SmolLM3",
    }.items()
}  # fmt: skip
# Numbers of a block of rows, which the fastest of the large caches holds a few times.
CACHED = 2**16


@dataclass(frozen=True, slots=True)
class Origin:
    """What an activation was computed from, which autograd keeps in any case: another copy of it
    costs less than to keep the activation too, the largest of what a transformer's block makes."""

    before: Float[Tensor, "*shape"]
    activation: Callable[[Tensor], Tensor]
    versions: tuple[int, int]
    """Of both, which count changes in place."""

    def again(self) -> Float[Tensor, "*shape"]:
        """The activation once more."""
        return self.activation(self.before)


def origin_of(x: Tensor) -> Origin | None:
    """Where a tensor came from, if an activation that was replaced has made it and neither has
    been changed in place since."""
    origin = getattr(x, _ORIGIN, None)
    if origin is None or origin.versions != (origin.before._version, x._version):
        return None
    return origin


_ORIGIN = "_made_by_fused_activation"


class _GELU(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        output = super().forward(input)
        versions = input._version, output._version
        setattr(output, _ORIGIN, Origin(input.detach(), super().forward, versions))
        return output


class _RMSNorm(nn.Module):
    """w x / √(mean x² + ε) (Zhang and Sennrich 2019), of a model whose weights are frozen."""

    def __init__(self, written_out: Any) -> None:
        super().__init__()
        self.written_out = written_out

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if x.dtype == torch.float64:  # as written: rounded to float32
            return self.written_out(x)
        weight, epsilon = self.written_out.weight, float(self.written_out.variance_epsilon)
        rows = _RMSNormalised.apply(x.flatten(0, -2), weight, epsilon)
        assert isinstance(rows, Tensor)
        return rows.view(x.shape)


class _RMSNormalised(torch.autograd.Function):
    """Rows divided by their root mean square, in float32 at least, times frozen weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "m d"], weight: Float[Tensor, " d"], epsilon: float
    ) -> Float[Tensor, "m d"]:
        if ctx.needs_input_grad[1]:
            raise ValueError("the gradient of RMSNorm's weight is not told here; freeze the model")
        output = torch.empty_like(x)
        scale = x.new_empty(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))
        for rows in row_blocks(x, CACHED):
            wide = x[rows].to(scale.dtype)
            scale[rows] = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
            torch.mul((wide * scale[rows]).to(x.dtype), weight, out=output[rows])
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Float[Tensor, "m d"], None, None]:
        x, weight, scale = ctx.saved_tensors
        [slope] = slopes
        gradient = torch.empty_like(x)
        for rows in row_blocks(x, CACHED):
            wide, factor = x[rows].to(scale.dtype), scale[rows]
            inner = (slope[rows] * weight).to(scale.dtype).mul_(factor)
            along = (inner * wide).mean(dim=-1, keepdim=True).mul_(factor.square())
            gradient[rows] = inner.addcmul_(wide, along, value=-1)
        return gradient, None, None


def _replacement(module: nn.Module) -> nn.Module | None:
    kind = type(module).__module__, type(module).__name__
    if kind in WRITTEN_OUT:
        return _GELU()
    # One that moves its inputs between devices (accelerate) does so in a hook of its own.
    if kind in RMS_NORMS and not hasattr(module, "_hf_hook"):
        return _RMSNorm(module)
    return None


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[None]:
    """Replace them inside the block; they are put back when it ends, also by an exception."""
    replaced = [
        (parent, name, child, replacement)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (replacement := _replacement(child)) is not None
    ]
    try:
        for parent, name, _, replacement in replaced:
            setattr(parent, name, replacement)
        yield
    finally:
        for parent, name, child, _ in replaced:
            setattr(parent, name, child)
