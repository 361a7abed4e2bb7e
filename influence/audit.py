"""What a filter missed, estimated from a random sample of what it rejected."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FilterRecall:
    """Of all sequences at least as influential as the filter's k-th, the share it kept.

    `low` and `high` bound the 95 % interval from resampling the audited sequences. `missed` is
    the estimated number of such sequences that it rejected.
    """

    k: int
    recall: float
    low: float
    high: float
    missed: float

    @classmethod
    def of(
        cls,
        scores: Float[Tensor, " n"],
        selected: Bool[Tensor, " n"],
        audited: Bool[Tensor, " n"],
        num_rejected: int,
        k: int,
        seed: int,
        num_resamples: int = 2000,
    ) -> "FilterRecall":
        """Estimate for one query (Horvitz and Thompson 1952: each audited sequence stands for
        `num_rejected` / audited ones).

        Args:
            scores: influence of every scored sequence.
            selected: those that the filter kept for this query. Scored sequences that are
                neither selected nor audited were kept for another query: they count once.
            audited: the random sample of the `num_rejected` that no query kept.
            num_rejected: how many sequences no query kept.
            k: the filter's k-th most influential sequence sets the threshold.
            seed: of the resampling.
            num_resamples: of the audited sequences, for the interval.

        Raises:
            ValueError: if the filter kept fewer than `k`.
        """
        if int(selected.sum()) < k:
            raise ValueError(
                f"the filter kept {int(selected.sum())} sequences for this query, fewer than "
                f"k = {k}; raise `filter.top`"
            )
        threshold = scores[selected].topk(k).values[-1]
        above = scores >= threshold
        missed_known = int((above & ~selected & ~audited).sum())
        hits = above[audited].double()
        weight = num_rejected / max(len(hits), 1)

        def recall(num_hits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
            return k / (k + missed_known + weight * num_hits)

        generator = torch.Generator().manual_seed(seed)
        if len(hits):
            drawn = torch.randint(len(hits), (num_resamples, len(hits)), generator=generator)
            resampled = recall(hits[drawn].sum(dim=1))
        else:
            resampled = recall(torch.zeros(1).double())
        low, high = resampled.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        return cls(
            k, float(recall(hits.sum())), low, high, float(missed_known + weight * hits.sum())
        )
