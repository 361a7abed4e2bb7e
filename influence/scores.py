"""Scores: their sign and scale, and the highest of them (Grosse et al. 2023, Eq. 25 and 30).

A raw contraction is ⟨(G + λI)⁻¹∇f, ∇L(z)⟩; influence is −1/N of it: nats of f per extra copy of z
in training, positive when z raises f.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def influence(raw: Float[Tensor, "*shape"], num_training_sequences: int) -> Float[Tensor, "*shape"]:
    """−raw / N: nats of f per extra copy of the sequence, + raises f (Eq. 5 and 6, ε = 1/N)."""
    if num_training_sequences < 1:
        raise ValueError(f"N is {num_training_sequences}; a training set has at least 1 sequence")
    return -raw / num_training_sequences


@dataclass(frozen=True, slots=True)
class TopK:
    """The k highest scores of each query, best first; equal scores by smaller id.

    `found` is k, or fewer while fewer scores were seen.
    """

    ids: Int[Tensor, "q found"]
    scores: Float[Tensor, "q found"]
    k: int

    @classmethod
    def of(cls, ids: Int[Tensor, " n"], scores: Float[Tensor, "q n"], k: int) -> "TopK":
        """The top of one set of scores; fewer than k when there are fewer."""
        return cls._best(ids.expand(len(scores), -1), scores, k)

    def merge(self, other: "TopK") -> "TopK":
        """The top of both; any order of merging gives the same answer.

        Raises:
            ValueError: if they are the top of different k.
        """
        if self.k != other.k:
            raise ValueError(f"a top {self.k} and a top {other.k} do not merge; take one k")
        ids = torch.cat([self.ids, other.ids], dim=1)
        return self._best(ids, torch.cat([self.scores, other.scores], dim=1), self.k)

    @classmethod
    def _best(cls, ids: Int[Tensor, "q n"], scores: Float[Tensor, "q n"], k: int) -> "TopK":
        by_id = ids.argsort(dim=1, stable=True)
        ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return cls(ids.gather(1, best), scores.gather(1, best), k)
