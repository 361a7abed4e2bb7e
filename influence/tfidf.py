"""TF-IDF filter over model tokens (Grosse et al. 2023, Eq. 28 and 29).

Eq. 28 weighs a query token by (k₁ + 1)·e / (k₁ + e), where e says whether the document holds it.
As e is 0 or 1, that is e whatever k₁: the score is Σ IDF(t) over query tokens that occur.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DocumentFrequency:
    """How many sequences hold each token, and how many sequences were counted."""

    counts: Int[Tensor, " v"]
    num_documents: int

    @classmethod
    def of(cls, sequences: Iterable[Int[Tensor, " _"]], vocabulary: int) -> "DocumentFrequency":
        """Count one set of token sequences."""
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        num_documents = 0
        for tokens in sequences:
            counts[tokens.long().unique()] += 1
            num_documents += 1
        return cls(counts, num_documents)

    def __add__(self, other: "DocumentFrequency") -> "DocumentFrequency":
        return DocumentFrequency(
            self.counts + other.counts, self.num_documents + other.num_documents
        )

    def idf(self) -> Float[Tensor, " v"]:
        """log((C − c + ½) / (c + ½) + 1) of every token, float64 (Eq. 29)."""
        counts = self.counts.double()
        return ((self.num_documents - counts + 0.5) / (counts + 0.5) + 1).log()


def presence(sequences: Sequence[Int[Tensor, " _"]], vocabulary: int) -> Bool[Tensor, "n v"]:
    """Which sequence holds which token."""
    held = torch.zeros(len(sequences), vocabulary, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        held[row, tokens.long()] = True
    return held


def tfidf_scores(
    query: Int[Tensor, " t"], held: Bool[Tensor, "n v"], idf: Float[Tensor, " v"]
) -> Float[Tensor, " n"]:
    """Σ IDF(t)·[sequence holds t] over the query's tokens, repeated tokens counting again."""
    weights = torch.zeros_like(idf).index_add(0, query.long(), idf[query.long()])
    return held.to(idf.dtype) @ weights
