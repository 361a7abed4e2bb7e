"""Minibatches of the stochastic solvers, and the most curvature that one of them has."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.validation.ggn import top_eigenvalue

Product = Callable[..., Float[Tensor, "k p"]]  # of vectors [k p], and `examples`, their places


def minibatches(num_examples: int, size: int, seed: int) -> Iterator[Int[Tensor, " b"]]:
    """Endless places of examples, each once an epoch; the last short batch of an epoch is left."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, num_examples)
    while True:
        order = torch.randperm(num_examples, generator=generator)
        for start in range(0, num_examples - size + 1, size):
            yield order[start : start + size]


def worst_eigenvalue(
    product: Product, like: Float[Tensor, " p"], num_examples: int, batch: int, seed: int
) -> float:
    """The largest top eigenvalue of a minibatch's operator, over one epoch of them.

    Every example is met, so that a single one with far more curvature than the rest is not missed.
    Within some tenth: it bounds a step.

    Args:
        product: the operator of the examples at some places, times vectors.
        like: a vector, for its length, dtype and device.
        num_examples: N.
        batch: examples of a minibatch.
        seed: of the minibatches.
    """
    order, worst = next(minibatches(num_examples, num_examples, seed)), 0.0
    for start in range(0, num_examples, batch):
        # The last is filled up: in a batch of fewer, an example would weigh more.
        places = order[min(start, max(0, num_examples - batch)) :][:batch]
        operator = partial(product, examples=places)
        worst = max(worst, top_eigenvalue(operator, like, seed, 0.05, 10))
    return worst
