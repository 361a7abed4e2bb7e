"""Scores: one pass over candidates, contracted with every query at once (Eq. 25 and 30).

This file owns the sign and the scale. A raw contraction is ⟨(G + λI)⁻¹∇f, ∇L(z)⟩; influence is
−1/N of it: nats of f per extra copy of z in training, positive when z raises f.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.contraction import Contractions, Waiting
from influence.examples import Batch
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import training_loss
from influence.passes import check_finite, run_pass

MEMORY = 2**31


def influence(raw: Float[Tensor, "*shape"], num_training_sequences: int) -> Float[Tensor, "*shape"]:
    """−raw / N: nats of f per extra copy of the sequence, + raises f (Eq. 5 and 6, ε = 1/N)."""
    if num_training_sequences < 1:
        raise ValueError(f"N is {num_training_sequences}; a training set has at least 1 sequence")
    return -raw / num_training_sequences


def stream(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, LowRank],
    batches: Iterable[Batch],
    memory: int = MEMORY,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n l"]]]:
    """Raw scores of each batch, per layer in the order of `layers`; their sum is the sequence's.

    Args:
        model: in evaluation mode.
        layers: the attributed layers.
        prepared: the queries of each layer.
        batches: the candidates.
        memory: bytes for dense matrices of many queries, and for gradients that wait to meet them.

    Yields:
        The batch's ids, and ⟨V_q, ∇L(z_n)⟩ of each layer, in the dtype of the pass.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, instead of a score that is not finite.
    """
    contractions = Contractions(prepared, memory)
    held: list[tuple[Batch, list[Tensor | Waiting]]] = []
    for batch in batches:
        ios = run_pass(model, layers, batch, training_loss)
        columns: list[Tensor | Waiting] = []
        for layer in layers:
            if layer.name in ios:
                columns.append(contractions.begin(layer, ios[layer.name]))
            else:  # an idle expert: no gradient, no influence
                left = prepared[layer.name].left
                columns.append(left.new_zeros(len(left), len(batch.ids)))
        held.append((batch, columns))
        waits = any(isinstance(column, Waiting) for column in columns)
        if not waits or sum(len(each.ids) for each, _ in held) >= contractions.window:
            yield from _finished(contractions, layers, held)
            held.clear()
    yield from _finished(contractions, layers, held)


def _finished(
    contractions: Contractions,
    layers: Sequence[Layer],
    held: Sequence[tuple[Batch, list[Tensor | Waiting]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The scores of the batches held, once all that waits has met the queries."""
    for at, layer in enumerate(layers):
        waiting = [one for _, c in held if isinstance(one := c[at], Waiting)]
        if waiting:
            found = contractions.finish(layer.name, waiting)
            parts = iter(found.split([len(each.gradients) for each in waiting], dim=1))
            for _, columns in held:
                if isinstance(columns[at], Waiting):
                    columns[at] = next(parts)
    for batch, columns in held:
        raw = torch.stack([c for c in columns if isinstance(c, Tensor)], dim=-1)
        if not raw.isfinite().all():
            for at, layer in enumerate(layers):
                check_finite(raw[..., at].sum(dim=0), layer.name, batch)
        yield batch.ids, raw


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
