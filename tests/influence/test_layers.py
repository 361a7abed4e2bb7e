"""Which layers are attributed: kinds, globs, tied weights, shared inputs."""

import pytest
import torch
from torch import nn

from influence.layers import find_layers, layer_groups, share_inputs
from tests.influence import models

BLOCK = "model.layers.0."


def names(model: nn.Module, *patterns: str) -> list[str]:
    return [layer.name for layer in find_layers(model, patterns)[0]]


@pytest.mark.parametrize("case", models.CASES)
def test_d_in_and_d_out_are_those_of_the_map_whatever_the_storage(case):
    model = models.CASES[case]()
    for layer in models.attributed(model):
        assert model.get_submodule(layer.name) is layer.module
        weight = layer.module.weight
        o, i = weight.shape[::-1] if type(layer.module).__name__ == "Conv1D" else weight.shape
        assert layer.has_bias == (layer.module.bias is not None)
        assert (layer.d_out, layer.d_in) == (o, i + layer.has_bias)
        assert layer.input_group == layer.name


def test_roles_pick_the_mlp_or_the_attention():
    assert names(models.gpt2(), "mlp") == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert names(models.gpt2(), "attention") == [
        "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj",
    ]  # fmt: skip
    gated = [BLOCK + f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert names(models.llama(), "mlp") == gated
    heads = [BLOCK + f"self_attn.{part}_proj" for part in "qkvo"]
    assert names(models.llama(), "attention") == heads


def test_globs_pick_by_name_and_a_layer_matched_twice_is_there_once_in_model_order():
    model = models.llama(num_layers=2)
    assert names(model, "*.1.mlp.*") == [
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    picked = names(model, "*.down_proj", "mlp", "*.up_proj")
    assert picked == [
        f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")
    ]


def test_a_glob_that_matches_nothing_is_named_together_with_what_there_is():
    with pytest.raises(ValueError, match=r"no_such_layer(.|\n)*fc1"):
        find_layers(models.mlp(), ["mlp", "no_such_layer*"])


def test_a_glob_that_matches_only_modules_that_are_not_linear_matches_nothing():
    with pytest.raises(ValueError, match="embedding"):
        find_layers(models.mlp(), ["embedding"])


def test_a_tied_unembedding_is_left_out_with_a_reason():
    layers, coverage = find_layers(models.gpt2(), ["all"])
    assert "lm_head" not in [layer.name for layer in layers]
    (left_out,) = [item for item in coverage.left_out if item.name == "lm_head"]
    assert "tied" in left_out.reason
    with pytest.raises(ValueError, match="lm_head"):
        find_layers(models.gpt2(), ["lm_head"])


def test_an_untied_unembedding_is_a_layer_like_any_other():
    assert "lm_head" in names(models.llama(), "all")


@pytest.mark.parametrize("case", models.CASES)
@pytest.mark.parametrize("pattern", ["mlp", "all"])
def test_every_parameter_is_attributed_or_named_as_left_out(case, pattern):
    model = models.CASES[case]()
    layers, coverage = find_layers(model, [pattern])
    total = sum(p.numel() for p in model.parameters())
    assert coverage.attributed == tuple(layer.name for layer in layers)
    assert coverage.num_parameters == total
    assert coverage.num_attributed == sum(layer.d_in * layer.d_out for layer in layers)
    assert coverage.share == coverage.num_attributed / total
    named = {*coverage.attributed, *(item.name for item in coverage.left_out)}
    holders = [name for name, m in model.named_modules() if list(m.parameters(recurse=False))]
    assert named == set(holders)
    assert all(item.reason for item in coverage.left_out)
    left_out = sum(item.num_parameters for item in coverage.left_out)
    assert coverage.num_attributed + left_out == total  # a tied weight counts once


def test_q_k_v_share_their_input_and_so_do_gate_and_up():
    model = models.llama()
    layers = share_inputs(model, models.attributed(model), torch.tensor([[1, 2, 3]]))
    groups = {layer.name: layer.input_group for layer in layers}
    q, gate = BLOCK + "self_attn.q_proj", BLOCK + "mlp.gate_proj"
    shared = {
        q: q, BLOCK + "self_attn.k_proj": q, BLOCK + "self_attn.v_proj": q,
        gate: gate, BLOCK + "mlp.up_proj": gate,
    }  # fmt: skip
    assert groups == {name: shared.get(name, name) for name in groups}


def test_layers_of_gpt2_share_nothing():
    model = models.gpt2(num_layers=2)
    layers = share_inputs(model, models.attributed(model), torch.tensor([[1, 2, 3]]))
    assert all(layer.input_group == layer.name for layer in layers)


def test_layers_with_and_without_bias_share_no_factor_though_they_share_their_input():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
            self.three = nn.Linear(3, 4, bias=False)

        def forward(self, input_ids, **_):
            x = torch.nn.functional.one_hot(input_ids, 3).float()
            return self.one(x) + self.two(x) + self.three(x).sum(-1, keepdim=True)

    model = Twins()
    layers = share_inputs(model, find_layers(model, ["all"])[0], torch.tensor([[0, 2]]))
    assert [layer.input_group for layer in layers] == ["one", "two", "two"]


def test_layers_between_which_their_input_changes_in_place_do_not_share_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, input_ids, **_):
            x = torch.nn.functional.one_hot(input_ids, 3).float()
            y = self.one(x)
            x += y
            return self.two(x) + self.three(x)

    model = Residual()
    layers = share_inputs(model, find_layers(model, ["all"])[0], torch.tensor([[0, 2]]))
    assert [layer.input_group for layer in layers] == ["one", "two", "two"]


def test_looking_for_shared_inputs_leaves_no_hook_behind():
    model = models.llama()
    share_inputs(model, models.attributed(model), torch.tensor([[1, 2, 3]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_go_in_groups_that_a_budget_holds_and_those_of_one_input_together():
    model = models.llama()
    layers = share_inputs(model, models.attributed(model), torch.zeros(1, 2, dtype=torch.int64))
    inputs = {layer.name: layer.input_group for layer in layers}
    shared = {group for group in inputs.values() if list(inputs.values()).count(group) > 1}
    assert shared
    for memory in range(len(layers) + 2):
        groups = layer_groups(layers, len, memory)
        assert sorted(each.name for group in groups for each in group) == sorted(inputs)
        for group in groups:
            names = {layer.input_group for layer in group}
            assert len(group) <= memory or len(names) == 1
            for other in groups:
                assert other is group or not names & {layer.input_group for layer in other}
    assert layer_groups(layers, len, len(layers)) == [layers]
    assert len(layer_groups(layers, len, 0)) == len(set(inputs.values()))
