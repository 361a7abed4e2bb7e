"""Vectors, matrices of layers and the model's own parameters: the same numbers, three times."""

import pytest
import torch

from tests.influence import validation_cases as cases
from tests.influence import validation_oracles as oracles

KINDS = ["regression", "images", "gpt2"]  # Linear, Conv2d, Conv1D


@pytest.mark.parametrize("name", KINDS)
def test_a_vector_comes_back_from_blocks_and_from_parameters(name):
    case = cases.of(name)
    layout, V = case.layout, case.vectors(2)
    for vector in (V, V[0]):
        assert torch.equal(layout.vector(layout.blocks(vector)), vector)
        assert torch.equal(layout.from_parameters(layout.parameters(vector)), vector)
    assert layout.size == V.shape[1]


@pytest.mark.parametrize("name", KINDS)
def test_parameters_of_a_vector_have_the_models_names_and_shapes(name):
    case = cases.of(name)
    own = dict(case.model.named_parameters())
    found = case.layout.parameters(case.vectors(1)[0])
    assert {n: v.shape for n, v in found.items()} == {n: own[n].shape for n in found}
    assert sum(v.numel() for v in found.values()) == case.layout.size


@pytest.mark.parametrize("name", KINDS)
def test_the_current_vector_is_the_weights_row_by_row_each_bias_behind_its_row(name):
    case = cases.of(name)
    current = case.layout.current()
    assert torch.equal(current, oracles.theta(case.modules))
    assert not current.requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_numbers_by_layer_are_on_every_parameter_of_the_layer(name):
    case = cases.of(name)
    got = case.layout.by_layer(case.dampings, case.vectors(1))
    assert torch.equal(got, case.damping_vector)
    assert len(got.unique()) == len(case.layers)
