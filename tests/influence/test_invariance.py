"""Batch size, order, padding and shards change nothing: float32, relative error about 1e-6.

float32 rounds to 6e-8; one sequence left out or one label drawn otherwise gives 1e-2 and more.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch

from influence.damping import RelativeDamping
from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock
from influence.factors import fit_factors
from influence.sequences import TokenBatch, batches_by_tokens
from influence.spectrum import fit_spectra
from influence.streaming import stream
from tests.influence import models
from tests.influence.attribution import QUERIES
from tests.influence.preparing import prepare, query_gradients


def padded(batch: TokenBatch, columns: int) -> TokenBatch:
    """The same sequences with further padding, of a token that means something."""
    filling = torch.full((len(batch.ids), columns), 3)
    return TokenBatch(
        batch.ids,
        torch.cat([batch.tokens, filling], dim=1),
        torch.cat([batch.supervised, torch.zeros_like(filling, dtype=torch.bool)], dim=1),
    )


LENGTHS = (9, 4, 12, 2, 7, 7, 3, 11, 5, 10, 6, 8)


def arrangements(sequences: Sequence[models.Tokens]) -> dict[str, list[TokenBatch]]:
    """The same twelve sequences in other batches, orders and paddings."""

    def grouped(rows_of_batches: Sequence[Sequence[int]]) -> list[TokenBatch]:
        return [models.batch([sequences[r] for r in rows], rows) for rows in rows_of_batches]

    everything = list(range(len(sequences)))
    return {
        "one batch": grouped([everything]),
        "one by one": grouped([[row] for row in everything]),
        "in reverse": grouped([everything[::-1][i : i + 5] for i in (0, 5, 10)]),
        "by length": grouped(batches_by_tokens([len(z[0]) for z in sequences], 24)),
        "more padding": [padded(b, 4) for b in grouped([everything[:6], everything[6:]])],
    }


def by_id(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Scores [q, n] with sequences in the order of their ids."""
    ids, raw = torch.cat([p[0] for p in pieces]), torch.cat([p[1].sum(-1) for p in pieces], dim=1)
    return raw[:, ids.argsort()]


def quantities(
    model: torch.nn.Module, batches: list[TokenBatch], bases: dict[str, EigenBasis]
) -> dict[str, torch.Tensor]:
    """Covariances, corrected eigenvalues and scores of one arrangement, by name."""
    layers, dtype = models.attributed(model), next(model.parameters()).dtype
    bases = {name: basis.to(dtype, "cpu") for name, basis in bases.items()}
    factors = fit_factors(model, layers, batches, 0)
    spectra = fit_spectra(model, layers, bases, batches, 1)
    found = {}
    for layer in layers:
        of, spectrum = factors.of(layer), spectra[layer.name]
        assert of.A.num_tokens == of.S.num_tokens == sum(int(b.supervised.sum()) for b in batches)
        assert spectrum.num_sequences == sum(len(b.ids) for b in batches)
        found |= {f"A {layer.name}": of.A.sum, f"S {layer.name}": of.S.sum}
        found[f"eigenvalues {layer.name}"] = spectrum.values
    blocks = {name: EKFACBlock(bases[name], spectra[name].values.to(dtype)) for name in bases}
    gradients = query_gradients(model, layers, QUERIES, 1000)
    prepared = prepare(gradients, blocks, RelativeDamping(0.1), None)
    found["scores"] = by_id(list(stream(model, layers, prepared, batches)))
    return found


@pytest.mark.parametrize("arrangement", ["one by one", "in reverse", "by length", "more padding"])
@pytest.mark.parametrize("case", models.CASES)
def test_batch_size_order_and_padding_change_nothing_in_float32(case, arrangement):
    """At most 1e-6, or twice what float32 itself loses where a processor's kernels lose more.

    What float32 loses is the distance of the reference from the same arrangement in float64.
    """
    model, sequences = models.CASES[case](), models.corpus(lengths=LENGTHS)
    layers, ways = models.attributed(model), arrangements(sequences)
    factors = fit_factors(model, layers, ways["one batch"], 0)
    bases = {
        layer.name: EigenBasis(
            eigendecompose(factors.of(layer).A.value, layer.name).vectors,
            eigendecompose(factors.of(layer).S.value, layer.name).vectors,
        )
        for layer in layers
    }
    exact = quantities(model, ways["one batch"], bases)
    single = models.CASES[case]().float()
    reference = quantities(single, ways["one batch"], bases)
    other = quantities(single, ways[arrangement], bases)
    for name, value in reference.items():
        lost = models.relative_error(value, exact[name])
        assert lost < 1e-5, name
        assert models.relative_error(other[name], value) <= max(1e-6, 2 * lost), name


@pytest.mark.parametrize("num_shards", [2, 3, 12])
def test_another_number_of_shards_changes_nothing_in_float32(num_shards):
    model, sequences = models.gpt2().float(), models.corpus(lengths=LENGTHS)
    layers = models.attributed(model)
    bases = {
        layer.name: EigenBasis(
            models.orthogonal(0, layer.d_in).float(), models.orthogonal(1, layer.d_out).float()
        )
        for layer in layers
    }
    cuts = [len(sequences) * s // num_shards for s in range(num_shards + 1)]
    shards = [models.batch(sequences[a:b], range(a, b)) for a, b in itertools.pairwise(cuts)]
    whole = [models.batch(sequences, range(len(sequences)))]
    factors = fit_factors(model, layers, shards[:1], 0)
    spectra = fit_spectra(model, layers, bases, shards[:1], 1)
    for shard in shards[1:]:
        factors = factors + fit_factors(model, layers, [shard], 0)
        partial = fit_spectra(model, layers, bases, [shard], 1)
        spectra = {name: spectra[name] + partial[name] for name in spectra}
    wanted, wanted_spectra = (
        fit_factors(model, layers, whole, 0), fit_spectra(model, layers, bases, whole, 1),
    )  # fmt: skip
    for layer in layers:
        got, want = factors.of(layer), wanted.of(layer)
        assert models.relative_error(got.A.value, want.A.value) <= 1e-6
        assert models.relative_error(got.S.value, want.S.value) <= 1e-6
        name = layer.name
        assert models.relative_error(spectra[name].values, wanted_spectra[name].values) <= 1e-6
