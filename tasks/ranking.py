"""Raw score shards, read as influence: totals of every method, query and candidate."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.scores import influence
from tasks import store


@dataclass(frozen=True, slots=True)
class Influences:
    """Influence of the candidates, in nats of f per extra copy; `rows` ascending.

    `self_influence` is that of each candidate on its own log-probability; None if not asked for.
    `layers` splits `scores` by layer: it is kept apart, since it is the larger by far.
    """

    methods: tuple[str, ...]
    queries: tuple[str, ...]
    layers: tuple[str, ...]
    rows: Int[Tensor, " n"]
    scores: Float[Tensor, "m q n"]
    self_influence: Float[Tensor, " n"] | None

    def of(self, method: str) -> Float[Tensor, "q n"]:
        """The scores of one method."""
        return self.scores[self.methods.index(method)]


def read_influences(folder: Path, num_training_sequences: int) -> Influences:
    """Merge the shards of stage `stream`, in their order, with sign and 1/N applied."""
    index = store.read_json(folder / "index.json")
    rows, scores, own = [], [], []
    for name in index["shards"]:
        rows.append(store.read_tensor(folder / name, "rows"))
        raw = store.read_tensor(folder / name, "scores")
        # Summed over layers in float64: the sum must not depend on how many layers there are.
        scores.append(influence(raw.double().sum(dim=-1), num_training_sequences))
        if "self_influence" in store.tensor_names(folder / name):
            form = store.read_tensor(folder / name, "self_influence").double().sum(dim=-1)
            own.append(influence(-form, num_training_sequences))  # f = −L here
    return Influences(
        tuple(index["methods"]),
        tuple(index["queries"]),
        tuple(index["layers"]),
        torch.cat(rows),
        torch.cat(scores, dim=-1),
        torch.cat(own) if own else None,
    )


def ranks(scores: Float[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Rank of every score, 1 for the highest; equal scores keep the order of the rows."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[-1] + 1).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
