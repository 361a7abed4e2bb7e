"""Passes in half precision: sums are wider than the pass, and an overflow has a name."""

import pytest
import torch

from influence.capture import LayerIO
from influence.factors import fit_factors
from influence.layers import find_layers
from influence.lowrank import LowRank
from influence.objectives import training_loss
from influence.passes import NonFiniteSequenceError, pseudo_gradients, run_pass
from influence.spectrum import fit_spectra
from influence.streaming import stream
from influence.subspace import SharedSubspace
from tests.influence import families, models
from tests.influence.test_eigenbasis import basis

NARROW = [torch.bfloat16, torch.float16]


def narrow(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple, object]:
    model = families.build("llama").to(dtype)
    layers, _ = find_layers(model, ["mlp"])
    return model, layers, models.batch(models.corpus(lengths=(9, 12, 16), prompt=3))


@pytest.mark.parametrize("dtype", NARROW)
def test_factors_and_spectra_of_a_narrow_pass_are_summed_in_float32_and_more(dtype):
    """Rounding each sum to the pass's dtype would cost 2⁻⁹ of it."""
    model, layers, batch = narrow(dtype)
    batches = [batch] * 10
    ios = pseudo_gradients(model, layers, batch, 0)
    factors = fit_factors(model, layers, batches, 0)
    bases = {layer.name: basis(layer.d_in, layer.d_out).to(dtype, "cpu") for layer in layers}
    spectra = fit_spectra(model, layers, bases, batches, 0)
    for layer in layers:
        io, of = ios[layer.name], factors.of(layer)
        for rows, covariance in ((io.a, of.A), (io.ds, of.S)):
            x = batch.rows(rows).double()
            assert covariance.sum.dtype == torch.float64
            assert models.relative_error(covariance.value, x.mT @ x / len(x)) < 1e-5
        rotated = bases[layer.name].rotate_gradient(io).double()
        values = spectra[layer.name].values
        assert values.dtype == torch.float64
        assert models.relative_error(values, rotated.square().mean(0)) < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
def test_scores_of_a_narrow_pass_are_its_products_to_its_own_rounding(dtype):
    model, layers, batch = narrow(dtype)
    ios = run_pass(model, layers, batch, training_loss)
    V = {layer.name: torch.randn(2, layer.d_out, layer.d_in).to(dtype) for layer in layers}
    prepared = {name: LowRank.of(each, None) for name, each in V.items()}
    [(_, raw)] = list(stream(model, layers, prepared, [batch]))
    for at, layer in enumerate(layers):
        io = ios[layer.name]
        wide = LayerIO(io.a.double(), io.ds.double(), io.has_bias).gradient()
        wanted = V[layer.name].double().flatten(1) @ wide.flatten(1).mT
        assert models.relative_error(raw[..., at].double(), wanted) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 90, 95)])  # small, and by subspace iteration
def test_narrow_queries_are_truncated_as_wide_ones(dtype, shape):
    V = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, wide = LowRank.of(V, 3), LowRank.of(V.float(), 3)
    assert low.left.dtype == low.right.dtype == dtype
    wanted = wide.dense()
    assert models.relative_error(low.to(torch.float32, "cpu").dense(), wanted) < 2e-2
    shared = SharedSubspace.of(low, 4)
    assert shared.cores.dtype == shared.outputs.dtype == dtype
    wider = SharedSubspace.of(low.to(torch.float32, "cpu"), 4)
    assert shared.lost == pytest.approx(wider.lost, abs=1e-3)


def test_an_overflow_in_float16_is_an_error_with_layer_and_sequence():
    model, layers, batch = narrow(torch.float16)
    with torch.no_grad():
        layers[0].module.weight.mul_(1e3)
        layers[1].module.weight.mul_(1e3)
    with pytest.raises(NonFiniteSequenceError, match=r"mlp.down_proj.*float32"):
        run_pass(model, layers, batch, training_loss)
    wide = model.to(torch.float32)
    run_pass(wide, layers, batch, training_loss)  # float32 holds the same numbers
