"""Split-half agreement: scores from curvature fitted on two disjoint halves of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock
from influence.factors import fit_factors
from influence.queries import Query, prepare, query_gradients
from influence.scores import influence, stream
from influence.spectrum import fit_spectra
from influence.statistics import Agreement
from tasks import store
from tasks.attributed import Attributed, PassReference
from tasks.prepared import damping_of
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
    """Fit everything on one half, and score the sample with it."""
    [half] = shard.items
    settings = context.params.validate_
    reference = PassReference.of(context)
    attributed = reference.attributed()
    tokens = TokenStore.open(context.artifact("tokenize"))
    # Every other of the sorted rows: disjoint, and alike in where they come from.
    rows = tokens.fit_rows(2 * settings.split_half, settings.seed)[half::2]
    solvers = fit_solvers(reference, attributed, rows, settings.seed + half)
    queries = [
        Query(query["name"], tuple(query["prompt_tokens"]), tuple(query["completion_tokens"]))
        for query in store.read_json(context.artifact("query") / "queries.json")
    ]
    gradients = query_gradients(
        attributed.model, attributed.layers, queries, reference.tokens_per_batch
    )
    prepared = prepare(gradients, solvers, damping_of(context.params), context.params.query.rank)
    candidates = store.read_table(context.artifact("filter") / "candidates.parquet", ["row"])
    sample = choose_rows(candidates["row"].to_pylist(), settings.sample, settings.seed)
    batches = reference.batches(sample)
    raw = [part for _, part in stream(attributed.model, attributed.layers, prepared, batches)]
    # Both halves meet the sample in the same order, so it need not be put back into rows.
    scores = influence(torch.cat(raw, dim=1).double().cpu(), tokens.num_sequences)
    names = [layer.name for layer in attributed.layers]
    store.write_tensors(path, {"scores": scores}, {"layers": names})


def fit_solvers(
    reference: PassReference, attributed: Attributed, rows: Sequence[int], seed: int
) -> dict[str, EKFACBlock]:
    """EK-FAC of every layer from these rows alone, in memory."""
    model, layers = attributed.model, attributed.layers
    factors = fit_factors(model, layers, reference.batches(rows), seed)
    groups = {
        group: eigendecompose(covariance.value, f"A/{group}")
        for group, covariance in factors.inputs.items()
    }
    bases = {
        layer.name: EigenBasis(
            groups[layer.input_group].vectors,
            eigendecompose(factors.outputs[layer.name].value, f"S/{layer.name}").vectors,
        ).to(reference.dtype, reference.device)
        for layer in layers
    }
    spectra = fit_spectra(model, layers, bases, reference.batches(rows), seed + 1_000_003)
    return {
        name: EKFACBlock(bases[name], spectrum.values.to(reference.device, reference.dtype))
        for name, spectrum in spectra.items()
    }
