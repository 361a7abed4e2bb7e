"""Spectra on disk: sums and counts of the corrected eigenvalues, by layer."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from influence.spectrum import Spectrum
from tasks import store


def write_spectra(
    path: Path, spectra: Mapping[str, Spectrum], dtype: torch.dtype = torch.float64
) -> None:
    """Sums and counts of Λ by layer."""
    store.write_tensors_in_turn(path, spectrum_tensors(spectra, dtype))


def spectrum_tensors(
    spectra: Mapping[str, Spectrum], dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, Tensor]]:
    """What is written of spectra."""
    for name, spectrum in spectra.items():
        yield f"{name}/squared_sum", spectrum.squared_sum.to(dtype)
        yield f"{name}/norm_sum", spectrum.norm_sum
        yield f"{name}/rotated_norm_sum", spectrum.rotated_norm_sum
        yield f"{name}/num_sequences", torch.tensor(spectrum.num_sequences)


def read_spectra(path: Path) -> dict[str, Spectrum]:
    """The inverse of `write_spectra`."""
    return {name: read_spectrum(path, name) for name in spectrum_names(path)}


def read_spectrum(path: Path, name: str) -> Spectrum:
    """That of one layer."""
    return Spectrum(
        store.read_tensor(path, f"{name}/squared_sum"),
        store.read_tensor(path, f"{name}/norm_sum"),
        store.read_tensor(path, f"{name}/rotated_norm_sum"),
        int(store.read_tensor(path, f"{name}/num_sequences")),
    )


def spectrum_names(path: Path) -> list[str]:
    """The layers in a file, sorted."""
    ends = "/squared_sum"
    return [name.removesuffix(ends) for name in store.tensor_names(path) if name.endswith(ends)]


def add_spectra(parts: Sequence[Path], path: Path, dtype: torch.dtype) -> None:
    """Write the sum of files that hold the same layers, one layer in memory at a time."""

    def sums() -> Iterator[tuple[str, Tensor]]:
        for name in spectrum_names(parts[0]):
            total = reduce(add, (read_spectrum(part, name) for part in parts))
            yield from spectrum_tensors({name: total}, dtype)

    store.write_tensors_in_turn(path, sums())
