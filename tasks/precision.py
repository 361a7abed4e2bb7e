"""Where a pass computes, in which dtype, and which one its results are kept in."""

import torch

from tasks.params import RunParams

SPREAD = "spread"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def dtype_at_rest(params: RunParams) -> torch.dtype:
    """Of factors, eigenvectors and spectra on disk: sums are taken in float64, and what a float32
    pass reads is kept in float32."""
    return torch.promote_types(DTYPES[params.runtime.dtype], torch.float32)


def resolve_device(name: str) -> str:
    """`auto` takes CUDA where there is one; what `spread` stands for, `devices_of` says."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices_of(device: str) -> list[str]:
    """The devices that hold a worker's model, the first of which its batches go to: one, or for
    `spread` all GPUs that this process sees.

    Raises:
        ValueError: `spread`, and no GPU here.
    """
    if device != SPREAD:
        return [device]
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if not found:
        raise ValueError(
            "`runtime.device` is spread, but this process sees no GPU; run it where there are some "
            "(and CUDA_VISIBLE_DEVICES names them), or write auto or cpu"
        )
    return found
