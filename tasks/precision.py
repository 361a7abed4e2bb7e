"""Where a pass computes, in which dtype, and which one its results are kept in."""

import torch

from tasks.params import RunParams

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def dtype_at_rest(params: RunParams) -> torch.dtype:
    """Of factors, eigenvectors and spectra on disk: sums are taken in float64, and what a float32
    pass reads is kept in float32."""
    return torch.promote_types(DTYPES[params.runtime.dtype], torch.float32)


def resolve_device(name: str) -> str:
    """`auto` takes CUDA where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
