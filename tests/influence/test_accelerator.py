"""Every phase on a GPU is the phase on the CPU, in float64; skipped where there is none."""

import copy

import pytest
import torch
from torch import nn

from influence.damping import RelativeDamping
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.factors import fit_factors
from influence.layers import find_layers
from influence.queries import Method, Query, prepare_queries
from influence.selfinfluence import SelfInfluence
from influence.spectrum import fit_spectra
from influence.streaming import Told, stream_all
from influence.tokens import rescore, token_grids
from tests.influence import models
from tests.influence.attribution import QUERIES

DAMPING = RelativeDamping(0.1)
ASKED = [*QUERIES, Query("contrast", (3, 1), (0,), (5, 2))]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
# The CPU against itself, moved the same way, so that the test is known to run.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def phases(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each phase gives, back on the CPU."""
    device = next(model.parameters()).device
    layers, _ = find_layers(model, ("all",))
    sequences = models.corpus()
    batches = [
        models.batch(sequences[:2]).to(device),
        models.batch(sequences[2:], [102, 103]).to(device),
    ]
    factors = fit_factors(model, layers, batches, 0)
    bases = {
        layer.name: EigenBasis(
            models.orthogonal(n, layer.d_in), models.orthogonal(n + 50, layer.d_out)
        ).to(torch.float64, layer.device)
        for n, layer in enumerate(layers)
    }
    spectra = fit_spectra(model, layers, bases, batches, 1)
    solvers = {name: EKFACBlock(bases[name], each.values) for name, each in spectra.items()}
    found: dict[str, torch.Tensor] = {}
    for layer in layers:
        if layer.name in factors.outputs:  # else an expert that nothing reached
            found[f"A {layer.name}"] = factors.of(layer).A.sum
            found[f"S {layer.name}"] = factors.of(layer).S.sum
        found[f"Λ {layer.name}"] = spectra[layer.name].squared_sum
    for rank in (None, 1):
        prepared = prepare_queries(
            model, layers, ASKED, {"ekfac": Method(solvers, DAMPING)}, rank, 100
        )["ekfac"]
        weights = sum(layer.d_in * layer.d_out for layer in layers)
        waiting = (8 * len(ASKED) - 1) * weights  # less than the dense matrices of all queries
        for memory in (1, waiting, 2**31):  # met at once, waiting, dense matrices kept
            told: list[Told] = list(
                stream_all(
                    model, layers, prepared, batches, memory, SelfInfluence(solvers, DAMPING), 1
                )
            )
            key = f"rank {rank}, memory {memory}"
            found[f"scores, {key}"] = torch.cat([each.scores for each in told], dim=1)
            for each in told:
                assert each.self_influence is not None
                found[f"self {each.ids.tolist()}, {key}"] = each.self_influence
                found |= {f"grid {at}, {key}": grid for at, grid in each.grids.items()}
        found[f"tokens, rank {rank}"] = token_grids(model, layers, prepared, batches[0], 4)
        dense = {name: query.dense() for name, query in prepared.items()}
        again = rescore(model, layers, dense, batches[0], [(0, 1)], 4)
        found |= {f"rescored, rank {rank}": again.scores, f"again {rank}": again.grids[0, 1]}
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", models.CASES)
def test_every_phase_gives_the_numbers_of_the_cpu(case, device):
    model = models.CASES[case]()
    wanted, got = phases(model), phases(copy.deepcopy(model).to(device))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
