"""Activations that a model writes out step by step, run as the one kernel that PyTorch has.

transformers' NewGELU (GPT-2, GPT-Neo, GPT-J, Phi and others) goes over its input eight times, and
over more on the way back: an eighth of a training step of GPT-2. The kernel computes the same
function (Hendrycks and Gimpel 2016, the form with tanh) up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

# By name: this package does not know transformers.
WRITTEN_OUT = {
    ("transformers.activations", "NewGELUActivation"),
    ("transformers.activations", "FastGELUActivation"),
}


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


class _Fused(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        output = super().forward(input)
        versions = input._version, output._version
        setattr(output, _ORIGIN, Origin(input.detach(), super().forward, versions))
        return output


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Replace them inside the block; they are put back when it ends, also by an exception."""
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (type(child).__module__, type(child).__name__) in WRITTEN_OUT
    ]
    try:
        for parent, name, _ in replaced:
            setattr(parent, name, _Fused())
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
