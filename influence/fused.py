"""Activations that a model writes out step by step, run as the one kernel that PyTorch has.

transformers' NewGELU (GPT-2, GPT-Neo, GPT-J, Phi and others) goes over its input eight times, and
over more on the way back: an eighth of a training step of GPT-2. The kernel computes the same
function (Hendrycks and Gimpel 2016, the form with tanh) up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# By name: this package does not know transformers.
WRITTEN_OUT = {
    ("transformers.activations", "NewGELUActivation"),
    ("transformers.activations", "FastGELUActivation"),
}


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
            setattr(parent, name, nn.GELU(approximate="tanh"))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
