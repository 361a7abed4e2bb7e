"""LoRA: the two matrices beside a frozen layer are linear layers like any other."""

import itertools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from influence.damping import RelativeDamping
from influence.layers import find_layers
from influence.objectives import training_loss
from influence.passes import run_pass
from influence.queries import Method, prepare_queries
from influence.scores import influence
from influence.streaming import stream
from influence.validation.estimators import LABELS_APART, fit_curvature
from tests import oracles
from tests.influence import models
from tests.influence.attribution import QUERIES, N, query_sequence

CASES = {
    "llama": (models.llama, ["q_proj", "down_proj"]),
    "gpt2": (models.gpt2, ["c_attn", "c_fc"]),  # beside transposed weights
}
CASE = pytest.mark.parametrize("case", CASES)


def adapted(case: str) -> nn.Module:
    """The base with a LoRA of rank 2 of which no matrix is zero. Dropout is there, and off."""
    build, targets = CASES[case]
    config = LoraConfig(
        r=2, lora_alpha=3, lora_dropout=0.5, target_modules=targets,
        fan_in_fan_out=case == "gpt2",
    )  # fmt: skip
    model = inject_adapter_in_model(config, build())
    return models.randomise(model, 1)


@CASE
def test_the_role_adapter_is_the_matrices_of_the_adapter_and_nothing_of_the_base(case):
    model = adapted(case)
    layers, coverage = find_layers(model, ["adapter"])
    assert len(layers) == 2 * len(CASES[case][1])
    inside = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    assert {f"{layer.name}.weight" for layer in layers} == set(inside)
    assert coverage.num_attributed == sum(inside.values())
    assert any(left.name.endswith("base_layer") for left in coverage.left_out)


def test_what_an_adapter_saves_whole_belongs_to_it():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    layers, _ = find_layers(inject_adapter_in_model(config, models.llama()), ["adapter"])
    assert [layer.name for layer in layers][-1] == "lm_head.modules_to_save.default"


def test_without_an_adapter_the_role_is_an_error():
    with pytest.raises(ValueError, match=r"'adapter' matches no linear layer"):
        find_layers(models.llama(), ["adapter"])


@CASE
def test_gradients_are_autograds_of_the_adapters_weights(case):
    model, sequences = adapted(case), models.corpus()
    layers, _ = find_layers(model, ["adapter"])
    ios = run_pass(model, layers, models.batch(sequences), training_loss)
    assert all(io.gradient().abs().max() > 1e-3 for io in ios.values())
    for (n, z), layer in itertools.product(enumerate(sequences), layers):
        wanted = -oracles.sequence_gradient(model, layer.module, z)
        torch.testing.assert_close(ios[layer.name].gradient()[n], wanted, rtol=1e-9, atol=1e-12)


@CASE
def test_scores_are_the_dense_damped_solve_of_the_adapters_blocks(case):
    model, sequences = adapted(case), models.corpus()
    layers, _ = find_layers(model, ["adapter"])
    batch = models.batch(sequences)
    fitted = fit_curvature(model, layers, [batch], 0)
    labels = models.drawn_labels(model, sequences, LABELS_APART)
    methods = {"ekfac": Method(fitted.solvers, RelativeDamping(0.1))}
    prepared = prepare_queries(model, layers, QUERIES, methods, None, 1000)["ekfac"]
    [(_, raw)] = stream(model, layers, prepared, [batch])
    curvatures, dampings = [], []
    for layer in layers:
        basis = fitted.ekfac[layer.name].basis
        drawn = zip(sequences, labels, strict=True)
        pseudo = [oracles.sequence_gradient(model, layer.module, *each) for each in drawn]
        values = oracles.spectrum(pseudo, basis.Q_A, basis.Q_S)
        curvatures.append(oracles.ekfac(basis.Q_A, basis.Q_S, values))
        dampings.append(0.1 * values.mean().item())
    scores = influence(raw.sum(dim=-1), N)
    for (q, query), (n, z) in itertools.product(enumerate(QUERIES), enumerate(sequences)):
        f, log_p = (
            [oracles.sequence_gradient(model, layer.module, each) for layer in layers]
            for each in (query_sequence(query), z)
        )
        wanted = oracles.influence(f, [-each for each in log_p], curvatures, dampings, N)
        assert scores[q, n].item() == pytest.approx(wanted, rel=1e-8, abs=1e-12)
