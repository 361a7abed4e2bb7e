"""Prepared queries on disk: (G + λI)⁻¹∇f of each method, query and layer, as low-rank factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import influence.queries
from influence.damping import Damping, RelativeDamping
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.queries import Method, Query
from influence.solver import GradientDot
from tasks import store
from tasks.attributed import PassReference
from tasks.damping import damping_rule
from tasks.eigens import read_bases
from tasks.params import RunParams
from tasks.spectra import read_spectra
from tasks.workspace import StageContext

EKFAC, GRADIENT_DOT = "ekfac", "gradient_dot"


def damping_of(params: RunParams) -> Damping:
    """The rule that `query.damping` names."""
    return damping_rule(params.query.damping)


def damping_grid(params: RunParams) -> dict[str, RelativeDamping]:
    """EK-FAC at further λ, by the method's name: `ekfac@0.01`."""
    return {f"{EKFAC}@{ratio:g}": RelativeDamping(ratio) for ratio in params.query.damping_grid}


def methods_of(params: RunParams) -> tuple[str, ...]:
    """All methods whose queries a run prepares, in the order of its score shards."""
    return (EKFAC, GRADIENT_DOT, *damping_grid(params))


def prepare_queries(
    context: StageContext,
    reference: PassReference,
    queries: Sequence[Query],
    rank: int | None,
    methods: Sequence[str],
) -> dict[str, dict[str, LowRank]]:
    """Gradients of all queries, solved by each method and truncated to `rank`."""
    attributed = reference.attributed()
    solvers = run_solvers(context, reference, attributed.layers)
    dampings = {EKFAC: damping_of(context.params), **damping_grid(context.params)}
    dots = {layer.name: GradientDot() for layer in attributed.layers}
    ways = {GRADIENT_DOT: Method(dots, damping_of(context.params))}  # which a dot product ignores
    ways |= {name: Method(solvers, damping) for name, damping in dampings.items()}
    return influence.queries.prepare_queries(
        attributed.model,
        attributed.layers,
        queries,
        {method: ways[method] for method in methods},
        rank,
        reference.tokens_per_batch,
    )


def run_solvers(
    context: StageContext, reference: PassReference, layers: Sequence[Layer]
) -> dict[str, EKFACBlock]:
    """The run's EK-FAC, as a pass reads it."""
    folders = context.artifact("eigen"), context.artifact("correct")
    return read_solvers(*folders, layers, reference.dtype, reference.device)


def write_prepared(path: Path, prepared: Mapping[str, Mapping[str, LowRank]]) -> None:
    """One pair of tensors a method and layer, the queries along the first axis."""
    tensors: dict[str, Tensor] = {}
    for method, layers in prepared.items():
        for layer, query in layers.items():
            tensors[f"{method}/{layer}/left"] = query.left
            tensors[f"{method}/{layer}/right"] = query.right
    store.write_tensors(path, tensors)


def read_prepared(
    path: Path, methods: Sequence[str], layers: Sequence[str], dtype: torch.dtype, device: str
) -> dict[str, LowRank]:
    """By layer, the queries of all `methods` one after another along the first axis."""

    def side(layer: str, name: str) -> Tensor:
        parts = [store.read_tensor(path, f"{method}/{layer}/{name}") for method in methods]
        return torch.cat(parts).to(device, dtype)

    return {layer: LowRank(side(layer, "left"), side(layer, "right")) for layer in layers}


def concatenate(parts: Sequence[Path], path: Path) -> None:
    """Join files of prepared queries along the first axis, in the order given."""
    names = store.tensor_names(parts[0])
    store.write_tensors(
        path, {name: torch.cat([store.read_tensor(part, name) for part in parts]) for name in names}
    )


def read_solvers(
    eigen: Path, correct: Path, layers: Sequence[Layer], dtype: torch.dtype, device: str
) -> dict[str, EKFACBlock]:
    """The EK-FAC solver of each layer, from the folders of `eigen` and `correct`."""
    bases = read_bases(eigen, layers, dtype, device)
    spectra = read_spectra(correct / "spectrum.safetensors")
    return {
        layer.name: EKFACBlock(bases[layer.name], spectra[layer.name].values.to(device, dtype))
        for layer in layers
    }
