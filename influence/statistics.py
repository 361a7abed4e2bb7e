"""Agreement between two sets of scores, never a bare correlation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson correlation; NaN when either side is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x @ y) / (x.norm() * y.norm()))


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson correlation of ranks; tied values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def bootstrap_interval(
    values: Float[Tensor, " q"], seed: int, num_resamples: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean, from means of values drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (num_resamples, len(values)), generator=generator)
    means = values.double()[drawn].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean correlation over queries, with a 95 % bootstrap interval of the mean Pearson."""

    pearson: float
    spearman: float
    low: float
    high: float
    num_queries: int

    @classmethod
    def of(
        cls, x: Float[Tensor, "q n"], y: Float[Tensor, "q n"], seed: int, num_resamples: int = 2000
    ) -> "Agreement":
        """Correlate row by row, then resample the queries."""
        each = torch.tensor([pearson(a, b) for a, b in zip(x, y, strict=True)]).double()
        ranks = torch.tensor([spearman(a, b) for a, b in zip(x, y, strict=True)]).double()
        low, high = bootstrap_interval(each, seed, num_resamples)
        return cls(float(each.mean()), float(ranks.mean()), low, high, len(each))
