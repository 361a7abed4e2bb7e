"""The linear datamodeling score: do sums of scores order retrained models? (Park et al. 2023)

For subsets S of the training data, the rank correlation over S of f, averaged over trainings on S,
with Σ_{i∈S} of the scores. With the sign of `influence.scores` it is positive when right.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.statistics import spearman


def datamodeling_score(
    scores: Float[Tensor, "q n"], subsets: Int[Tensor, "s k"], retrained: Float[Tensor, "s r q"]
) -> Float[Tensor, " q"]:
    """Spearman over subsets, for each query.

    Args:
        scores: of every training example.
        subsets: places of the examples that each subset holds.
        retrained: f of the queries after each of r trainings on each subset.
    """
    predicted = scores[:, subsets].sum(dim=-1)
    found = retrained.mean(dim=1).T
    return torch.tensor([spearman(p, f) for p, f in zip(predicted, found, strict=True)])


def noise_ceiling(retrained: Float[Tensor, "s r q"]) -> Float[Tensor, " q"]:
    """What the noise of training leaves of 1, for each query.

    The trainings of each subset are cut in two; the rank correlation r of the halves' means is
    raised to all of them, 2r / (1 + r) (Spearman 1910; Brown 1910), and its root is how well a
    perfect prediction would correlate with the noisy mean. 0 where the halves do not agree.
    """
    num_halves = retrained.shape[1] // 2
    if not num_halves:
        raise ValueError("one training a subset has no second half; train each at least twice")
    first = retrained[:, :num_halves].mean(dim=1).T
    second = retrained[:, num_halves : 2 * num_halves].mean(dim=1).T
    halves = torch.tensor([spearman(a, b) for a, b in zip(first, second, strict=True)])
    halves = halves.clamp(min=0)
    return (2 * halves / (1 + halves)).sqrt()


def random_subsets(
    num_examples: int, num_subsets: int, share: float, seed: int
) -> Int[Tensor, "s k"]:
    """Places of a random `share` of the examples, sorted, for each subset."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, round(share * num_examples))
    return torch.stack(
        [
            torch.randperm(num_examples, generator=generator)[:size].sort().values
            for _ in range(num_subsets)
        ]
    )
