"""Health of the fitted curvature, layer by layer."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tasks import store
from tasks.eigens import read_eigen
from tasks.spectra import read_spectra

TRACE_TOLERANCE = 1e-4  # float32 passes measure below 1e-7; a wrong basis is off by O(1)


def layer_health(factors: Path, eigen: Path, correct: Path) -> dict[str, dict[str, float]]:
    """What to look at before the scores of a layer are believed.

    Returns, by layer:
        trace_ratio: ‖g‖² in the eigenbasis over ‖g‖², of the first sequence of every shard: 1
            when the eigenbasis is orthogonal.
        condition: the largest of Λ over its median; the damping decides below it.
        effective_rank: (Σ Λ)² / Σ Λ², the number of directions that carry the curvature.
        effective_rank_A, effective_rank_S: the same of the two factors.
        damped_share: share of Λ below a tenth of its mean, where λ = 0.1 · mean takes over.

    Raises:
        ValueError: naming the layer, where the trace identity fails.
    """
    found: dict[str, dict[str, float]] = {}
    spectra = read_spectra(correct / "spectrum.safetensors")
    groups = {
        layer["name"]: layer["input_group"]
        for layer in store.read_json(factors / "layers.json")["layers"]
    }
    for name, spectrum in spectra.items():
        if spectrum.is_zero:  # an expert that no token of the fit reached
            continue
        values = spectrum.values.double().flatten()
        trace_ratio = spectrum.trace_ratio
        if not abs(trace_ratio - 1) <= TRACE_TOLERANCE:
            raise ValueError(
                f"layer {name!r}: rotation into the eigenbasis multiplied ‖g‖² by "
                f"{trace_ratio:.6g}, but must keep it: the eigenbasis is not orthogonal; run the "
                "stages eigen and correct again"
            )
        found[name] = {
            "trace_ratio": trace_ratio,
            "condition": float(values.max() / values.median()),
            "effective_rank": effective_rank(values),
            "effective_rank_A": effective_rank(read_eigen(eigen, f"A/{groups[name]}").values),
            "effective_rank_S": effective_rank(read_eigen(eigen, f"S/{name}").values),
            "damped_share": float((values < values.mean() / 10).double().mean()),
        }
    return found


def effective_rank(eigenvalues: Float[Tensor, " n"]) -> float:
    """(Σ λ)² / Σ λ²: n for n equal eigenvalues, 1 for a single one."""
    eigenvalues = eigenvalues.double()
    return float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())


def spectrum_curves(correct: Path, num_points: int = 200) -> dict[str, list[float]]:
    """Λ of each layer in descending order, thinned to points that a figure can show."""
    curves: dict[str, list[float]] = {}
    for name, spectrum in read_spectra(correct / "spectrum.safetensors").items():
        if spectrum.is_zero:
            continue
        values = spectrum.values.flatten().sort(descending=True).values
        at = torch.linspace(0, len(values) - 1, min(num_points, len(values))).long()
        curves[name] = values[at].tolist()
    return curves
