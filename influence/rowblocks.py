"""Rows of a matrix, as many at a time as a cache holds of them."""

from jaxtyping import Float
from torch import Tensor

BY_GPU = 2**26  # numbers of a block: a GPU wants large ones, and has no cache to stay in


def row_blocks(x: Float[Tensor, "m d"], cached: int, width: int | None = None) -> list[slice]:
    """All rows, in slices of as many as hold `cached` numbers, one row at least. Of no rows it is
    one empty slice.

    Args:
        x: the matrix.
        cached: numbers of a block on a CPU.
        width: numbers of a row of what is made of `x`, if it is not as wide as `x`.
    """
    numbers = cached if x.device.type == "cpu" else max(cached, BY_GPU)
    size = max(1, numbers // (width or x.shape[1]))
    return [slice(start, start + size) for start in range(0, max(1, len(x)), size)]
