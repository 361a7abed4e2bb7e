"""Where in a ranking the items stand that ought to be found: recall at k, reciprocal rank."""

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor


def target_ranks(scores: Float[Tensor, " n"], targets: Sequence[Int[Tensor, " _"]]) -> list[float]:
    """The rank of each target: how many items score at least as high as its best one.

    A tie counts against it: among items of one score, which come first is no merit of a method.

    Args:
        scores: of the items that are ranked, higher is better.
        targets: of each, the places in `scores` of its items, such as the windows of a document;
            none if none of them is ranked.

    Returns:
        1 for the best; infinity for a target that is not ranked.
    """
    return [
        float((scores >= scores[places].max()).sum()) if len(places) else math.inf
        for places in targets
    ]


def recall_at(ranks: Sequence[float], k: int) -> float:
    """The share of targets among the first `k`; those not ranked are missed.

    Raises:
        ValueError: without a target.
    """
    if not ranks:
        raise ValueError("recall of no target at all is not defined; give at least one")
    return sum(rank <= k for rank in ranks) / len(ranks)


def reciprocal_rank(ranks: Sequence[float]) -> float:
    """1 ÷ the rank of the first target (Voorhees 1999); 0 if none is ranked.

    Its mean over queries is the MRR.
    """
    return 1 / min(ranks, default=math.inf)
