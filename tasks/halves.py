"""Split-half agreement: scores from curvature fitted on two disjoint halves of the data."""

from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from influence.queries import Method, prepare_queries
from influence.scores import influence
from influence.statistics import Agreement
from influence.streaming import stream
from influence.validation.estimators import fit_curvature
from tasks import store
from tasks.attributed import PassReference
from tasks.layergroups import groups_of_layers, half_bytes
from tasks.prepared import damping_of, read_queries
from tasks.sequences import TokenStore, choose_rows
from tasks.shards import ShardRef, map_shards, split
from tasks.workspace import StageContext

NUM_RESAMPLES = 500  # for the interval of one layer: there are many, and two digits are enough


@dataclass(frozen=True, slots=True)
class Halves:
    """Scores of the same sample by either half, split by layer; layers in the model's order."""

    layers: tuple[str, ...]
    first: Float[Tensor, "q n l"]
    second: Float[Tensor, "q n l"]

    @property
    def totals(self) -> tuple[Float[Tensor, "q n"], Float[Tensor, "q n"]]:
        """The scores themselves: the sum over layers."""
        return self.first.sum(dim=-1), self.second.sum(dim=-1)

    def agreement(self, seed: int) -> Agreement:
        """Of the scores."""
        return Agreement.of(*self.totals, seed)

    def by_layer(self, seed: int) -> dict[str, dict[str, float]]:
        """Pearson of each layer's share of the scores, and the low end of its interval.

        A layer whose share is the same in every sequence has no correlation, and no entry.
        """
        found: dict[str, dict[str, float]] = {}
        for place, name in enumerate(self.layers):
            each = Agreement.of(
                self.first[..., place], self.second[..., place], seed, NUM_RESAMPLES
            )
            if isfinite(each.pearson):
                found[name] = {"split_half": each.pearson, "split_half_low": each.low}
        return found


def split_half(context: StageContext) -> Halves:
    """Fit on two halves of the data, and score a sample of the candidates with either."""
    parts = map_shards(context, half_shard, split(2, 2), name="half", items="halves")
    first, second = (store.read_tensor(part, "scores") for part in parts)
    return Halves(tuple(store.read_metadata(parts[0])["layers"]), first, second)


def half_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Fit everything on one half, a group of layers at a time, and score the sample with it."""
    [half] = shard.items
    settings, rank = context.params.validate_, context.params.query.rank
    reference, queries = PassReference.of(context), read_queries(context)
    attributed = reference.attributed()
    tokens = TokenStore.open(context.artifact("tokenize"))
    # Every other of the sorted rows: disjoint, and alike in where they come from.
    rows = tokens.fit_rows(2 * settings.split_half, settings.seed)[half::2]
    candidates = store.read_table(context.artifact("filter") / "candidates.parquet", ["row"])
    sample = choose_rows(candidates["row"].to_pylist(), settings.sample, settings.seed)
    size = partial(
        half_bytes, num_queries=len(queries), rank=rank, itemsize=reference.dtype.itemsize
    )
    by_layer: dict[str, Tensor] = {}
    for layers in groups_of_layers(context, reference, attributed.layers, size):
        fitted = fit_curvature(
            attributed.model, layers, list(reference.batches(rows)), settings.seed + half
        )
        prepared = prepare_queries(
            attributed.model,
            layers,
            queries,
            {"ekfac": Method(fitted.solvers, damping_of(context.params))},
            rank,
            reference.tokens_per_batch,
        )["ekfac"]
        del fitted
        batches = reference.batches(sample)
        raw = [part for _, part in stream(attributed.model, layers, prepared, batches)]
        # Both halves meet the sample in the same order, so it need not be put back into rows.
        scores = influence(torch.cat(raw, dim=1).double().cpu(), tokens.num_sequences)
        by_layer |= {layer.name: scores[..., at] for at, layer in enumerate(layers)}
    names = [layer.name for layer in attributed.layers]
    scores = torch.stack([by_layer[name] for name in names], dim=-1)
    store.write_tensors(path, {"scores": scores}, {"layers": names})
