"""From a model to scores the way the stages go, for tests of the whole."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from influence.damping import Damping
from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock
from influence.factors import fit_factors
from influence.layers import Layer
from influence.queries import Query
from influence.scores import influence
from influence.sequences import TokenBatch
from influence.solver import LayerSolver
from influence.spectrum import fit_spectra
from influence.streaming import stream
from tests.influence import models
from tests.influence.preparing import prepare, query_gradients

QUERIES = [Query("one", (1, 2, 3), (4, 0)), Query("two", (5,), (2, 2, 1))]
N = 9  # sequences in training; more than are scored here


def query_sequence(query: Query) -> models.Tokens:
    """A query as the oracles take it."""
    tokens = torch.tensor([*query.prompt, *query.completion])
    return tokens, torch.arange(len(tokens)) >= len(query.prompt)


def fit(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[TokenBatch]
) -> dict[str, EKFACBlock]:
    """The three fits one after the other: A and S with seed 0, Λ with seed 1."""
    factors = fit_factors(model, layers, batches, 0)
    bases = {}
    for layer in layers:
        of = factors.of(layer)
        A, S = eigendecompose(of.A.value, layer.name), eigendecompose(of.S.value, layer.name)
        bases[layer.name] = EigenBasis(A.vectors, S.vectors)
    spectra = fit_spectra(model, layers, bases, batches, 1)
    return {name: EKFACBlock(bases[name], spectra[name].values) for name in bases}


def score(
    model: nn.Module,
    layers: Sequence[Layer],
    solvers: Mapping[str, LayerSolver],
    batches: Sequence[TokenBatch],
    damping: Damping,
    rank: int | None = None,
) -> torch.Tensor:
    """Influence [q, n, l] of the sequences of all batches."""
    gradients = query_gradients(model, layers, QUERIES, 1000)
    prepared = prepare(gradients, solvers, damping, rank)
    raw = [raw for _, raw in stream(model, layers, prepared, batches)]
    return influence(torch.cat(raw, dim=1), N)
