"""Spectra on disk: sums and counts of the corrected eigenvalues, by layer."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from influence.spectrum import Spectrum
from tasks import store


def write_spectra(
    path: Path, spectra: Mapping[str, Spectrum], dtype: torch.dtype = torch.float64
) -> None:
    """Sums and counts of Λ by layer."""
    tensors: dict[str, Tensor] = {}
    for name, spectrum in spectra.items():
        tensors[f"{name}/squared_sum"] = spectrum.squared_sum.to(dtype)
        tensors[f"{name}/norm_sum"] = spectrum.norm_sum
        tensors[f"{name}/rotated_norm_sum"] = spectrum.rotated_norm_sum
        tensors[f"{name}/num_sequences"] = torch.tensor(spectrum.num_sequences)
    store.write_tensors(path, tensors)


def read_spectra(path: Path) -> dict[str, Spectrum]:
    """The inverse of `write_spectra`."""
    tensors = store.read_tensors(path)
    return {
        name: Spectrum(
            tensors[f"{name}/squared_sum"],
            tensors[f"{name}/norm_sum"],
            tensors[f"{name}/rotated_norm_sum"],
            int(tensors[f"{name}/num_sequences"]),
        )
        for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in tensors)
    }


def add_spectra(parts: Iterable[Mapping[str, Spectrum]]) -> dict[str, Spectrum]:
    """Sum of shards, in the order given."""
    total: dict[str, Spectrum] = {}
    for part in parts:
        for name, spectrum in part.items():
            total[name] = total[name] + spectrum if name in total else spectrum
    return total
