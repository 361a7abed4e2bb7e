"""Products of float32 matrices, by the fastest of the kernels that PyTorch carries.

On a CPU PyTorch multiplies by MKL, whose AVX-512 kernels run on Intel's processors alone. On an
AMD processor with AVX-512 oneDNN, which PyTorch's compiler calls, multiplies twice as fast (240
against 110 · 10⁹ FLOP a second of a core). Which one runs follows from the processor and the
shapes, never from a clock: equal runs give equal bits. Elsewhere all of this is PyTorch's `@`.

`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off here as it does everywhere in PyTorch.
"""

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

SMALL = 2**20  # multiply-adds below which a call of oneDNN costs more than it spares


@cache
def prefers_onednn() -> bool:
    """Whether this is a processor on which oneDNN was measured to be faster than MKL."""
    told = getattr(torch.cpu, "get_capabilities", dict)()  # of PyTorch before 2.10 nothing is known
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # which PyTorch does not promise to keep
        and bool(told.get("avx512_f"))
        and "AMD" in str(told.get("cpu_name"))
    )


def product(
    x: Float[Tensor, "... m k"],
    y: Float[Tensor, "... k n"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "... m n"]:
    """x @ y, either of them one matrix or a stack of them; plus `bias` in every row."""
    if not multiplies_by_onednn(x, y):
        return _by_torch(x, y, bias)
    if y.ndim == 2:
        return _by_onednn(x, y, bias)
    if x.ndim == 2:
        assert bias is None
        return _by_onednn(y.mT, x.mT).mT
    return joined(products(x, y))


def products(x: Float[Tensor, "b m k"], y: Float[Tensor, "b k n"]) -> Iterator[Tensor]:
    """x @ y in parts of the batch, for whoever is done with one when he takes the next."""
    if not multiplies_by_onednn(x, y):
        yield x @ y
        return
    for left, right in zip(x, y, strict=True):
        yield _by_onednn(left, right).unsqueeze(0)


def joined(parts: Iterable[Float[Tensor, "_ m n"]]) -> Float[Tensor, "b m n"]:
    """Parts of a batch as one; of a single part, that part."""
    together = list(parts)
    return together[0] if len(together) == 1 else torch.cat(together)


def write_product(
    x: Float[Tensor, "*b m k"], y: Float[Tensor, "*b k n"], into: Float[Tensor, "*b m n"]
) -> None:
    """Write x @ y, two matrices or two stacks of them, where it belongs."""
    if not multiplies_by_onednn(x, y):
        torch.matmul(x, y, out=into)
    elif y.ndim == 2:
        into.copy_(_by_onednn(x, y))
    else:
        for place, part in zip(into, products(x, y), strict=True):
            place.copy_(part[0])


def add_product(
    x: Float[Tensor, "m k"], y: Float[Tensor, "k n"], into: Float[Tensor, "m n"]
) -> None:
    """Add x @ y to a sum."""
    if multiplies_by_onednn(x, y):
        into.add_(_by_onednn(x, y))
    else:
        into.addmm_(x, y)


def _wants_gradient(x: Tensor, y: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


def multiplies_by_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether x @ y is oneDNN's to multiply, which knows no gradients."""
    return suits_onednn(x, y) and not _wants_gradient(x, y)


def suits_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether it would be, if no gradient were wanted."""
    if not prefers_onednn() or not torch.backends.mkldnn.enabled:
        return False
    # Stacks of matrices are multiplied one by one, but where one side is a single matrix.
    rows = x.shape[-2] if x.ndim == y.ndim else x.numel() // max(1, x.shape[-1])
    columns = y.shape[-1] if y.ndim == 2 or x.ndim == y.ndim else y.numel() // max(1, y.shape[-2])
    return (
        (y.ndim == 2 or (y.ndim == 3 and x.ndim in (2, 3)))
        and x.dtype == y.dtype == torch.float32
        and x.device.type == y.device.type == "cpu"
        and min(rows, columns) > 1
        and rows * y.shape[-2] * columns >= SMALL
    )


def _by_onednn(
    x: Float[Tensor, "*batch m k"],
    y: Float[Tensor, "k n"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch m n"]:
    # A matrix whose rows lie apart in memory would be multiplied a number at a time.
    y = y if y.is_contiguous() or y.mT.is_contiguous() else y.contiguous()
    bias = None if bias is None else bias.contiguous()  # how it lies in memory would be overlooked
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, bias, "none", [], "")


def _by_torch(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """By whatever PyTorch takes.

    The one column more that a bias makes is multiplied apart on a CPU: rows that begin off the
    cache lines' bounds made MKL's product of 2049 columns a third slower than that of 2048.
    """
    columns = y.shape[-1]
    one_more = columns % 16 == 1 and columns > 16 and x.ndim > 1 and y.ndim == 2
    if not one_more or x.device.type != "cpu" or _wants_gradient(x, y):
        return x @ y if bias is None else nn.functional.linear(x, y.mT, bias)
    found = x.new_empty(*x.shape[:-1], columns)
    rows, into = x.flatten(0, -2), found.flatten(0, -2)
    torch.mm(rows, y[:, :-1], out=into[:, :-1])
    torch.mv(rows, y[:, -1], out=into[:, -1])
    return found if bias is None else found.add_(bias)
