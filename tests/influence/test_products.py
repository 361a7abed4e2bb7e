"""Products by oneDNN are the same numbers as PyTorch's own, wherever a pass or a fit takes them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from benchmarks.clock import seconds
from influence import products as module
from influence.damping import RelativeDamping
from influence.ekfac import EKFACBlock
from influence.experts import Route, RoutedLinear
from influence.factors import Factors, fit_factors
from influence.layers import find_layers
from influence.linearmaps import fast_linear_maps
from influence.products import add_product, product, products, write_product
from influence.queries import Method, Query, prepare_queries
from influence.selfinfluence import stream_self
from influence.spectrum import fit_spectra
from influence.streaming import stream_all
from influence.sums import UpperMoment
from tests.influence import families, models
from tests.influence.mixtures import apart, fused
from tests.influence.test_eigenbasis import basis

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


class Calls(TorchDispatchMode):
    """Counts products, and sees that oneDNN is given no matrix that it multiplies slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.by_onednn = self.by_others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.by_onednn += 1
            assert args[1].is_contiguous() or args[1].mT.is_contiguous(), args[1].stride()
        elif func.overloadpacket in (
            torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.addmm_,
        ):  # fmt: skip
            self.by_others += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def onednn(monkeypatch: pytest.MonkeyPatch, smallest: int = 0) -> Iterator[Calls]:
    """As on a processor that prefers it, and however small the matrices are."""
    with monkeypatch.context() as patch, Calls() as calls:
        for each in ("products", "linearmaps"):
            patch.setattr(f"influence.{each}.prefers_onednn", lambda: True)
        patch.setattr("influence.products.SMALL", smallest)
        yield calls


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def layouts(matrix: Tensor) -> dict[str, Tensor]:
    """The same numbers, arranged otherwise in memory."""
    spaced = matrix.new_zeros(*matrix.shape[:-1], matrix.shape[-1] + 3)[..., :-3]
    spaced.copy_(matrix)
    return {
        "rows": matrix.contiguous(),
        "columns": matrix.mT.contiguous().mT,
        "rows apart": spaced,
        "columns apart": layouts_of_columns(matrix),
    }


def layouts_of_columns(matrix: Tensor) -> Tensor:
    spaced = matrix.new_zeros(*matrix.mT.shape[:-1], matrix.shape[-2] + 5)[..., :-5]
    spaced.copy_(matrix.mT)
    return spaced.mT


SHAPES = {
    "one by one": ((7, 5), (5, 6)),
    "a stack by one": ((3, 7, 5), (5, 6)),
    "one by a stack": ((7, 5), (3, 5, 6)),
    "stacks": ((3, 7, 5), (3, 5, 6)),
    "a stack of stacks by one": ((2, 3, 7, 5), (5, 6)),
}


@needs_onednn
@pytest.mark.parametrize("shapes", SHAPES)
def test_products_of_every_layout_are_those_of_float64(shapes, monkeypatch):
    x, y = (numbers(*shape, seed=n) for n, shape in enumerate(SHAPES[shapes]))
    wanted = x.double() @ y.double()
    with onednn(monkeypatch) as calls:
        for left in layouts(x).values():
            for right in layouts(y).values():
                got = product(left, right)
                assert got.dtype == torch.float32
                torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert calls.by_onednn >= 16
    assert calls.by_others == 0


@needs_onednn
def test_a_bias_joins_every_row(monkeypatch):
    x, y, bias = numbers(2, 7, 5), numbers(5, 17, seed=1), numbers(17, seed=2)
    wanted = x.double() @ y.double() + bias.double()
    with onednn(monkeypatch) as calls:
        torch.testing.assert_close(product(x, y, bias).double(), wanted, rtol=1e-5, atol=1e-5)
        apart = torch.stack([bias, bias], dim=1)[:, 0]
        torch.testing.assert_close(product(x, y, apart).double(), wanted, rtol=1e-5, atol=1e-5)
    assert (calls.by_onednn, calls.by_others) == (2, 0)
    for dtype in (torch.float32, torch.float64):  # 17 columns: the last one is multiplied apart
        got = product(*(each.to(dtype) for each in (x, y, bias)))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_products_are_written_added_and_handed_out_in_parts(monkeypatch):
    x, y = numbers(3, 7, 5), numbers(3, 5, 6, seed=1)
    wanted = x.double() @ y.double()

    def check() -> None:
        room = torch.zeros(3, 7, 8)
        write_product(x, y, into=room[..., 1:-1])
        torch.testing.assert_close(room[..., 1:-1].double(), wanted, rtol=1e-5, atol=1e-5)
        assert not room[..., [0, -1]].any()
        write_product(x[0], y[0], into=room[1, :, 1:-1])
        torch.testing.assert_close(room[1, :, 1:-1].double(), wanted[0], rtol=1e-5, atol=1e-5)
        total = torch.ones(7, 6)
        add_product(x[2], y[2], into=total)
        torch.testing.assert_close(total.double(), wanted[2] + 1, rtol=1e-5, atol=1e-5)
        parts = torch.cat(list(products(x, y)))
        torch.testing.assert_close(parts.double(), wanted, rtol=1e-5, atol=1e-5)

    check()
    with onednn(monkeypatch) as calls:
        check()
    assert calls.by_onednn == 3 + 1 + 1 + 3


@needs_onednn
def test_what_onednn_cannot_multiply_goes_where_it_did(monkeypatch):
    x, y = numbers(7, 5), numbers(5, 6, seed=1)
    with onednn(monkeypatch) as calls:
        for dtype in (torch.float64, torch.bfloat16):
            assert product(x.to(dtype), y.to(dtype)).dtype == dtype
        wants = x.clone().requires_grad_()
        product(wants, y).sum().backward()
        torch.testing.assert_close(wants.grad, y.sum(1).expand(7, -1))
        product(x, y[:, :1])  # a vector
        product(x.to("meta"), y.to("meta"))
        assert calls.by_onednn == 0
        with torch.backends.mkldnn.flags(enabled=False):
            product(x, y)
        assert calls.by_onednn == 0
        product(x, y)
        assert calls.by_onednn == 1
    with onednn(monkeypatch, smallest=7 * 5 * 6 + 1) as calls:
        product(x, y)
    assert calls.by_onednn == 0


def test_the_processor_decides(monkeypatch):
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    for told, wanted in (
        ({"cpu_name": "AMD EPYC 9005", "avx512_f": True}, has_both),
        ({"cpu_name": "AMD EPYC 7003", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        assert module.prefers_onednn.__wrapped__() == wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of older PyTorch
    assert not module.prefers_onednn.__wrapped__()


@pytest.mark.skipif(not module.prefers_onednn(), reason="this processor does not prefer oneDNN")
def test_where_it_is_preferred_it_is_faster():
    x, y = numbers(1024, 1024), numbers(1024, 1024, seed=1)
    ours, torchs = [], []
    for _ in range(7):
        ours.append(seconds(lambda: product(x, y)))
        torchs.append(seconds(lambda: x @ y))
    assert sorted(ours)[3] < 0.8 * sorted(torchs)[3]


@needs_onednn
def test_equal_products_give_equal_bits_in_every_thread(monkeypatch):
    x, y = numbers(65, 33), numbers(33, 47, seed=1)
    found: list[Tensor] = []
    with onednn(monkeypatch):
        threads = [threading.Thread(target=lambda: found.append(product(x, y))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, found[0]) for each in found)


@needs_onednn
@pytest.mark.parametrize("width", [5, 600])
def test_a_moment_is_that_of_float64(width, monkeypatch):
    """Of 600 columns there are three blocks of rows."""
    x = numbers(40, width)
    with onednn(monkeypatch) as calls:
        moment = UpperMoment(width, x)
        moment.add(x)
        moment.add(x[:7])
    found = torch.empty(width, width, dtype=torch.float64)
    moment.close(found)
    wide = torch.cat([x, x[:7]]).double()
    torch.testing.assert_close(found, wide.mT @ wide, rtol=1e-5, atol=1e-5)
    assert calls.by_onednn == 2 * (1 if width == 5 else 3)


def linear_maps() -> dict[str, nn.Module]:
    conv1d = Conv1D(6, 5)
    nn.init.normal_(conv1d.bias)
    fused = numbers(5, 6, seed=3).mT
    return {
        "Linear": nn.Linear(5, 6),
        "Linear without bias": nn.Linear(5, 6, bias=False),
        "Conv1D": conv1d,
        "of an expert": RoutedLinear(fused, numbers(6, seed=4)),
    }


@needs_onednn
@pytest.mark.parametrize("kind", linear_maps())
def test_a_frozen_linear_map_is_that_of_float64(kind, monkeypatch):
    linear = linear_maps()[kind].requires_grad_(False)
    model = nn.Sequential(linear)
    shape = (7, 5) if kind == "of an expert" else (2, 7, 5)
    x, slope = numbers(*shape).requires_grad_(), numbers(*shape[:-1], 6, seed=1)
    wide = x.detach().double().requires_grad_()
    wanted = linear.double()(wide)
    [wanted_slope] = torch.autograd.grad(wanted, wide, slope.double())
    linear.float()
    route = [Route(torch.arange(7), 7)] if kind == "of an expert" else []
    heard: list[Tensor] = []
    linear.register_forward_hook(lambda _, args, output: heard.append(output))
    with onednn(monkeypatch) as calls, fast_linear_maps(model):
        got = linear(x, *route)
        [got_slope] = torch.autograd.grad(got, x, slope, retain_graph=True)
    assert (calls.by_onednn, calls.by_others) == (2, 0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_slope.double(), wanted_slope, rtol=1e-5, atol=1e-5)
    assert heard[0] is got
    assert not got._is_view()  # a model may change it in place
    got.mul_(2)
    [doubled] = torch.autograd.grad(got, x, slope)
    torch.testing.assert_close(doubled, 2 * got_slope)
    assert "forward" not in vars(linear)


@needs_onednn
def test_linear_maps_that_are_not_frozen_or_not_theirs_run_as_they_are(monkeypatch):
    trains, replaced, frozen = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    replaced.requires_grad_(False)
    frozen.requires_grad_(False)
    replaced.forward = lambda x: x + 1  # as accelerate does
    model, x = nn.Sequential(trains, replaced, frozen), numbers(7, 5)
    with onednn(monkeypatch) as calls:
        with suppress(InterruptedError), fast_linear_maps(model):
            output = model(x)
            raise InterruptedError
        assert calls.by_onednn == 1
        output.sum().backward()
    assert trains.weight.grad is not None
    assert [("forward" in vars(each)) for each in model] == [False, True, False]
    torch.testing.assert_close(output, frozen(trains(x) + 1))


@needs_onednn
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "falcon", "mixtral", "gpt_oss"])
def test_a_whole_fit_and_its_scores_are_those_of_float64(family, monkeypatch):
    """Of a model in float32, all by oneDNN, beside the same model in float64, none of it."""
    build = families.build if family in families.FAMILIES else lambda kind: apart(fused(kind))
    narrow, wide = build(family).float(), build(family)
    with onednn(monkeypatch) as calls:
        got = everything(narrow)
    assert calls.by_onednn > 50
    wanted = everything(wide)
    assert got.keys() == wanted.keys()
    for name, each in got.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(
            each.double() / scale, wanted[name] / scale, rtol=0, atol=5e-5, msg=name
        )


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Λ, scores and self-influence in bases that do not depend on the model's dtype."""
    dtype = next(model.parameters()).dtype
    layers, _ = find_layers(model, ["mlp"])
    batches = [models.batch(models.corpus(lengths=(9, 12, 16), prompt=3))]
    factors = fit_factors(model, layers, batches, 0)
    reached = [layer for layer in layers if layer.name in factors.outputs]
    bases = {layer.name: basis(layer.d_in, layer.d_out).to(dtype, "cpu") for layer in reached}
    spectra = fit_spectra(model, reached, bases, batches, 0)
    solvers = {name: EKFACBlock(bases[name], spectra[name].values.to(dtype)) for name in bases}
    damping = RelativeDamping(0.1)
    prepared = prepare_queries(
        model, reached, [Query("a", (1, 2), (3, 4)), Query("b", (2,), (1, 5))],
        {"ekfac": Method(solvers, damping)}, None, 100,
    )  # fmt: skip
    told = list(stream_all(model, reached, prepared["ekfac"], batches))
    [(_, own)] = stream_self(model, reached, solvers, damping, batches)
    return {
        **moments(factors),
        **{f"Λ {name}": each.values for name, each in spectra.items()},
        "scores": told[0].scores,
        "self": own,
    }


def moments(factors: Factors) -> dict[str, Tensor]:
    sides = {"A": factors.inputs, "S": factors.outputs}
    return {f"{s} {name}": each.value for s, side in sides.items() for name, each in side.items()}
