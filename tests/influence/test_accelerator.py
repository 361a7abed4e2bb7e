"""Every phase on a GPU, and of a model spread over two, is the phase on the CPU, in float64.

What needs GPUs is skipped where there are none, or one; the same spread is also tried over two
devices that only say that they are two (`tests/devices.py`).
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from influence.damping import RelativeDamping
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.experts import separate_experts
from influence.factors import fit_factors
from influence.layers import find_layers
from influence.queries import Method, Query, prepare_queries
from influence.selfinfluence import SelfInfluence
from influence.spectrum import fit_spectra
from influence.streaming import Told, stream_all
from influence.tokens import rescore, token_grids
from tasks.placement import spread
from tests.devices import pretended
from tests.influence import mixtures, models
from tests.influence.attribution import QUERIES

DAMPING = RelativeDamping(0.1)
ASKED = [*QUERIES, Query("contrast", (3, 1), (0,), (5, 2))]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
# The CPU against itself, moved the same way, so that the test is known to run.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")

# Of each part, on which of two devices it is: the last is not where the first is, but for mlp and
# gpt2, whose unembedding is the embedding.
LLAMA = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
    "model.rotary_emb": 1, "lm_head": 1,
}  # fmt: skip
SPREAD = {
    "gpt2": {
        "transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.h.0": 0,
        "transformer.h.1": 1, "transformer.ln_f": 1, "lm_head": 0,
    },
    "llama": LLAMA,
    "mlp": {"embedding": 0, "block": 1, "head": 0},
    "mixtral": {name: 1 - place for name, place in LLAMA.items()},
}  # fmt: skip


def built(case: str) -> nn.Module:
    """A model with something on either side of a border."""
    made = {
        "gpt2": lambda: models.gpt2(num_layers=2),
        "llama": lambda: models.llama(num_layers=2),
        "mlp": models.mlp,
        "mixtral": lambda: mixtures.fused("mixtral", num_layers=2),
    }
    model: Any = made[case]()
    if hasattr(model, "config"):  # as a model is loaded
        model.config.use_cache = False
    return model


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
        for memory in (1, 2**31):
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


def spread_phases(case: str, devices: Sequence[str]) -> dict[str, torch.Tensor]:
    model = spread(built(case), {name: devices[place] for name, place in SPREAD[case].items()})
    return phases(separate_experts(model))


@pytest.mark.parametrize("case", SPREAD)
def test_a_model_over_two_devices_gives_the_very_bits_of_one(case):
    wanted = phases(separate_experts(built(case)))
    with pretended() as devices:
        got = spread_phases(case, devices)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name]), name


@needs_two
@pytest.mark.parametrize("case", SPREAD)
def test_a_model_over_two_gpus_gives_the_numbers_of_the_cpu(case):
    wanted = phases(separate_experts(built(case)))
    got = spread_phases(case, ("cuda:0", "cuda:1"))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
