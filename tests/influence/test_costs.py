"""Costs from shapes alone: against the paper's figures, real tensors, and operations counted."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from influence import costs
from influence.capture import LayerIO
from influence.contraction import Contractions
from influence.costs import ModelShape
from influence.eigenbasis import EigenBasis, RotatedInputs
from influence.factors import fit_factors
from influence.layers import Layer, find_layers
from influence.lowrank import LowRank
from influence.objectives import forward, training_loss
from influence.passes import run_pass
from influence.sequences import TokenBatch
from influence.subspace import SharedSubspace
from influence.sums import UpperMoment
from tests.influence import models


def layer(d_in: int, d_out: int, name: str = "one", group: str | None = None) -> Layer:
    module = nn.Linear(d_in, d_out, bias=False, device="meta")
    return Layer(name, module, d_in, d_out, False, group or name)


def mlp(width: int, blocks: int) -> list[Layer]:
    """Up and down, four times as wide between them."""
    up = [layer(width, 4 * width, f"{at}.up") for at in range(blocks)]
    down = [layer(4 * width, width, f"{at}.down") for at in range(blocks)]
    return [*up, *down]


def counted(work) -> int:
    # In-place products are not in its registry.
    into = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]}
    with (
        torch.backends.mkldnn.flags(enabled=False),  # whose products it does not know either
        FlopCounterMode(display=False, custom_mapping=into) as counter,
    ):
        work()
    return counter.get_total_flops()


def test_the_52B_model_of_the_paper_takes_what_the_paper_says():
    """§5 of the paper: 64 layers of width 8192; Eq. 27, and Appendix A with two blocks."""
    layers = mlp(8192, 64)
    assert costs.num_weights(layers) == 64 * 8 * 8192**2
    assert costs.curvature_ratio(layers) == 5.25
    assert costs.curvature_ratio(layers, blocks=2) == 3.125


def test_layers_with_one_input_keep_one_A():
    gate, up = layer(4, 6, "gate", "gate"), layer(4, 6, "up", "gate")
    assert sorted(costs.sides([gate, up])) == [4, 6, 6]
    assert costs.num_covariances([gate, up]) == 16 + 36 + 36
    assert costs.num_packed([gate, up]) == 10 + 21 + 21


@pytest.mark.parametrize("build", [models.gpt2, models.llama])
def test_numbers_are_those_of_real_tensors(build):
    model = build()
    layers = models.attributed(model)
    factors = fit_factors(model, layers, [_batch()], 0)
    sums = [each.sum for side in (factors.inputs, factors.outputs) for each in side.values()]
    assert costs.num_covariances(layers) == sum(each.numel() for each in sums)
    assert costs.num_weights(layers) == sum(
        each.module.weight.numel() + each.has_bias * each.d_out for each in layers
    )
    for rank in (None, 2, 10**6):
        kept = [LowRank.of(torch.randn(1, each.d_out, each.d_in), rank) for each in layers]
        assert costs.num_prepared(layers, rank) == sum(
            each.left.numel() + each.right.numel() for each in kept
        )


def test_a_training_step_is_one_fb():
    model = eager().requires_grad_()
    batch = _batch()

    def step() -> None:
        training_loss(forward(model, batch), batch).sum().backward()

    whole, length = shape(model), batch.tokens.shape[1]
    # The first block's inputs are embeddings; looking those up is no product.
    assert counted(step) == pytest.approx(
        batch.tokens.numel() * costs.training_flop(whole, length), rel=0.02
    )


def test_a_pass_forms_no_weight_gradient():
    model = eager()
    layers, _ = find_layers(model, ("all",))
    batch = _batch()
    told = batch.tokens.numel() * costs.pass_flop(shape(model), batch.tokens.shape[1])
    # Told is at most a block's input gradient too much: nothing flows below the lowest layer.
    done = counted(lambda: run_pass(model, layers, batch, training_loss))
    assert 0.8 * told < done <= told


@pytest.mark.parametrize("width", [24, 1600])
def test_covariances_multiply_one_half_where_blocks_are_many(width):
    one = layer(width, width)
    rows = torch.randn(3, width)
    moment = UpperMoment(width, rows)
    done = counted(lambda: moment.add(rows))
    assert 2 * done == 3 * costs.factor_flop(ModelShape((one,), 0, 0, 0, 0))  # A and S, 3 tokens


@pytest.mark.parametrize("length", [3, 10, 40])
@pytest.mark.parametrize("sizes", [(8, 20), (20, 8), (30, 30)])
def test_rotations_cost_what_they_do_in_the_form_that_runs(sizes, length):
    d_in, d_out = sizes
    basis = EigenBasis(torch.eye(d_in), torch.eye(d_out))
    io = LayerIO(torch.randn(2, length, d_in), torch.randn(2, length, d_out), False)
    done = counted(lambda: basis.rotate_gradient(io))
    assert done == 2 * costs.rotation_flop(layer(d_in, d_out), length)


@pytest.mark.parametrize("length", [4, 10])
def test_an_input_that_is_rotated_is_so_once_for_the_layers_in_a_row_that_take_it(length):
    """k is so narrow that alone it would rotate its gradient; v takes another input."""
    layers = [layer(8, 12, "q"), layer(8, 6, "k", "q"), layer(8, 12, "v")]
    a = {name: torch.randn(2, length, 8) for name in ("q", "v")}
    Q_A = {name: torch.eye(8) for name in a}

    def work() -> None:
        shared = RotatedInputs()
        for each in layers:
            io = LayerIO(a[each.input_group], torch.randn(2, length, each.d_out), False)
            EigenBasis(Q_A[each.input_group], torch.eye(each.d_out)).rotate_gradient(io, shared)

    squared = sum(2 * each.d_in * each.d_out for each in layers)
    assert counted(work) == 2 * (costs.spectrum_flop(layers, lambda _: length) - squared)


@pytest.mark.parametrize("num_queries", [1, 500])
def test_contractions_cost_what_they_do_in_the_form_that_runs(num_queries):
    one = layer(12, 16)
    query = LowRank(torch.randn(num_queries, 16, 2), torch.randn(num_queries, 2, 12))
    io = LayerIO(torch.randn(3, 30, 12), torch.randn(3, 30, 16), False)
    contractions = Contractions({"one": query}, memory=2**30)
    contractions.begin(one, io)  # what is made once is made
    done = counted(lambda: contractions.begin(one, io))
    assert done == 3 * costs.contraction_flop(one, 30, num_queries, 2)


def test_truncation_counts_the_subspace_iteration():
    V = torch.randn(1, 300, 400)
    done = counted(lambda: LowRank.of(V, 8))
    # The counter knows products, not QR and SVD.
    assert done == pytest.approx(costs.truncation_flop(layer(400, 300), 8), rel=0.12)
    assert costs.truncation_flop(layer(400, 300), None) == 0


def eager() -> Any:
    """Attention as plain products, which are all that the counter knows."""
    model: Any = models.gpt2(num_layers=4)
    model.set_attn_implementation("eager")
    return model


def _batch() -> TokenBatch:
    supervised = torch.ones(3, 6, dtype=torch.bool)
    supervised[:, 0] = False
    return TokenBatch(torch.arange(3), torch.randint(models.VOCABULARY, (3, 6)), supervised)


def shape(model) -> ModelShape:
    layers, coverage = find_layers(model, ("all",))
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    linear += [each for each in model.modules() if type(each).__name__ == "Conv1D"]
    return ModelShape(
        layers,
        coverage.num_parameters,
        sum(each.weight.numel() for each in linear),
        model.config.num_hidden_layers * model.config.hidden_size,
        model.config.vocab_size,
    )


@pytest.mark.parametrize("num_queries", [3, 100])  # which decides whether Gram matrices are formed
def test_a_subspace_counts_how_it_is_found(num_queries):
    query = LowRank(torch.randn(num_queries, 300, 4), torch.randn(num_queries, 4, 200))
    done = counted(lambda: SharedSubspace.of(query, 20))
    wanted = costs.subspace_flop(layer(200, 300), num_queries, 4, 20)
    assert done == pytest.approx(wanted, rel=0.12)
    shared = SharedSubspace.of(query, 20)
    numbers = sum(side.numel() for side in (shared.outputs, shared.inputs, shared.cores))
    assert costs.num_shared(layer(200, 300), num_queries, 4, 20) == numbers
