"""Long sums of matrices: products are added in place, and what has gathered is kept in float64.

Turning every product into float64 would cost more memory traffic than the products do work.
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from influence.products import add_product, multiplies_by_onednn

CARRY = 16  # additions in the dtype of the pass; rounding grows with them, traffic falls
BLOCK = 256  # columns of a product; narrower ones are slower for each multiplication
# Rows that are 2048 numbers apart all fall into the same few sets of a cache; a few more tell them
# apart. With these blocks and this, a sum of 2048 columns took 112 ms instead of 143.
SKEW = 16


class LongSum:
    """Σ of matrices of one shape; `open()` is where to add in place.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        like: a tensor of the pass. Sums are taken in its dtype, in float32 at least.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._gathered = torch.zeros(rows, columns, dtype=dtype, device=like.device)
        self._total: Tensor | None = None
        self._additions = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of what can be added."""
        return self._gathered.dtype

    def open(self) -> Float[Tensor, "rows columns"]:
        """Room for one addition: the caller adds to it in place."""
        if self._additions >= CARRY:
            self._carry()
        self._additions += 1
        return self._gathered

    def total(self) -> Float[Tensor, "rows columns"]:
        """The sum in float64."""
        self._carry()
        assert self._total is not None
        return self._total

    def close(self) -> Float[Tensor, "rows columns"]:
        """The sum, as the last thing asked of it: in float64 if it was long."""
        return self._gathered if self._total is None else self.total()

    def _carry(self) -> None:
        if self._total is None:
            self._total = self._gathered.double()
            if self._total is self._gathered:  # a float64 pass
                self._gathered = torch.zeros_like(self._total)
                self._additions = 0
                return
        else:
            self._total.add_(self._gathered)
        self._gathered.zero_()
        self._additions = 0


def gathered(x: Float[Tensor, "s d"], places: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
    """Some of the rows, laid out so that `UpperMoment` reads them fast."""
    rows = x.new_empty(len(places), x.shape[1] + SKEW)[:, : x.shape[1]]
    return torch.index_select(x, 0, places, out=rows)


class UpperMoment:
    """Σ xᵀx as it grows, of which blocks on and above the diagonal are multiplied out, and kept.

    Args:
        width: of x.
        like: a tensor of the pass, as in `LongSum`.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        self._width = width
        self._sums = [LongSum(rows.stop - rows.start, width - rows.start, like)
                      for rows in _blocks(width)]  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of what can be added."""
        return self._sums[0].dtype

    def add(self, x: Float[Tensor, "s d"]) -> None:
        """Rows more, in `dtype`."""
        columns = x.mT
        if multiplies_by_onednn(columns, x):  # which else would lay them out for every block anew
            columns = columns.contiguous()
        for rows, into in zip(_blocks(self._width), self._sums, strict=True):
            add_product(columns[rows], columns[rows.start :].mT, into.open())

    def close(self, into: Float64[Tensor, "d d"]) -> None:
        """Write the whole sum, as the last thing asked of it; each part is let go on the way."""
        for rows in _blocks(self._width):
            upper = self._sums.pop(0).close()
            size, below = rows.stop - rows.start, slice(rows.stop, None)
            square = upper[:, :size]
            into[rows, rows] = (square + square.mT) / 2  # equal but for rounding
            into[rows, below] = upper[:, size:]
            into[below, rows] = upper[:, size:].mT


def num_upper(width: int) -> int:
    """Numbers that an `UpperMoment` keeps, and products that a row of x takes."""
    return sum((rows.stop - rows.start) * (width - rows.start) for rows in _blocks(width))


def _blocks(width: int) -> list[slice]:
    size = BLOCK if width >= 2 * BLOCK else width
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]
