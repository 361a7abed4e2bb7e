"""Batches of token sequences, and how sequences are grouped into them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from influence.likelihoods import NO_TARGET, Likelihood, Softmax


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded sequences; padding and other unsupervised tokens carry no loss.

    Right padding needs no attention mask: under causal attention no real position can see it.

    Args:
        ids: a stable key for each sequence, independent of batch, shard and order.
        tokens: token ids, padded on the right with any valid token.
        supervised: ``supervised[n, t]``: token t is a target, with loss −log p(token_t | earlier).
        likelihood: how outputs speak of targets. They are logits, unless the model was called
            without its output head, which then is part of the likelihood.

    Raises:
        ValueError: if a first token is supervised, since nothing predicts it.
    """

    ids: Int[Tensor, " n"]
    tokens: Int[Tensor, "n t"]
    supervised: Bool[Tensor, "n t"]

    likelihood: Likelihood = field(default_factory=Softmax)

    def __post_init__(self) -> None:
        # On a GPU the answer would make the host wait; batches are made on CPUs.
        if self.supervised.device.type == "cpu" and self.supervised[:, :1].any():
            raise ValueError(
                "the first token of a sequence is supervised, but no token comes before it to "
                "predict it; set supervised[:, 0] to False"
            )

    @classmethod
    def collate(
        cls,
        ids: Sequence[int],
        tokens: Sequence[Int[Tensor, " _"]],
        supervised: Sequence[Bool[Tensor, " _"]],
    ) -> "TokenBatch":
        """Pad rows of unequal length on the right."""
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            torch.as_tensor(ids, dtype=torch.int64),
            pad([row.long() for row in tokens], batch_first=True),
            pad(list(supervised), batch_first=True),
        )

    @property
    def loss_positions(self) -> Bool[Tensor, "n t"]:
        """Positions whose *next* token is supervised; the last position never is."""
        return torch.cat([self.supervised[:, 1:], torch.zeros_like(self.supervised[:, :1])], dim=1)

    @property
    def inputs(self) -> Int[Tensor, "n t"]:
        """What the model is called with."""
        return self.tokens

    @property
    def targets(self) -> Int[Tensor, "n t"]:
        """The true labels; token t is the label of position t − 1."""
        return self.tokens

    @property
    def owners(self) -> Int[Tensor, " m"]:
        """Of each row of outputs that carries a loss, the sequence that it belongs to."""
        return self.loss_positions.nonzero(as_tuple=True)[0]

    @property
    def most_carry_loss(self) -> bool:
        """Whether to take the loss of every position is cheaper than to leave some out first.

        Leaving out copies the rows of outputs, and their gradients on the way back, which of logits
        costs about as much as their loss; rows of anything else are copied for as little as their
        products with some hundredths of the head. On a GPU the answer is always yes: to count makes
        it wait.
        """
        if self.supervised.device.type != "cpu":
            return True
        most = 1 / 2 if isinstance(self.likelihood, Softmax) else 15 / 16
        return self.num_supervised >= most * self.supervised.numel()

    def position_labels(self, labels: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        """The label that each position predicts; `NO_TARGET` at those that carry no loss."""
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1))
        return following.masked_fill(~self.loss_positions, NO_TARGET)

    def rows(self, outputs: Float[Tensor, "n t v"]) -> Float[Tensor, "m v"]:
        """The rows of positions that carry a loss; the others are left out before any product."""
        # Several times faster than a mask, forward and backward.
        return outputs.flatten(0, 1).index_select(0, self.loss_positions.flatten().nonzero()[:, 0])

    def row_labels(self, labels: Shaped[Tensor, "n t"]) -> Shaped[Tensor, " m"]:
        """The labels of those rows, or whatever else belongs to the token that each predicts."""
        row, position = self.loss_positions.nonzero(as_tuple=True)
        return labels[row, position + 1]

    def with_row_labels(self, drawn: Int[Tensor, " m"]) -> Int[Tensor, "n t"]:
        """Labels with these in the place of supervised tokens; the other tokens stay."""
        row, position = self.loss_positions.nonzero(as_tuple=True)
        labels = self.tokens.clone()
        labels[row, position + 1] = drawn
        return labels

    def select(self, places: Int[Tensor, " k"]) -> "TokenBatch":
        """Some of the sequences, in the order given."""
        return replace(
            self,
            ids=self.ids[places],
            tokens=self.tokens[places],
            supervised=self.supervised[places],
        )

    @property
    def num_supervised(self) -> int:
        """Number of tokens that carry a loss."""
        return int(self.supervised.sum())

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device; a copy to a GPU does not wait for it."""
        if self.ids.device == torch.device(device):
            return self
        here = (self.ids, self.tokens, self.supervised)
        if torch.device(device).type == "cuda" and self.ids.device.type == "cpu":
            here = tuple(tensor.pin_memory() for tensor in here)
        ids, tokens, supervised = (tensor.to(device, non_blocking=True) for tensor in here)
        return replace(self, ids=ids, tokens=tokens, supervised=supervised)


def batches_by_tokens(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group rows so that rows × longest row stays within a budget, longest rows first.

    Sorting by length keeps the padding small. A row longer than the budget is a batch of its own.

    Returns:
        Lists of indices into ``lengths``; each index once.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; it must be at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in longest_first:
        # The first row of a batch is its longest, so it alone sets the padded width.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
