"""Prepared queries on disk: (G + λI)⁻¹∇f of each method, query and layer, as low-rank factors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import influence.queries
from influence.damping import Damping, RelativeDamping
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.queries import Method, Query
from influence.solver import GradientDot, Unreached
from tasks import store
from tasks.attributed import Attributed, PassReference
from tasks.damping import damping_rule
from tasks.eigens import read_bases
from tasks.layergroups import layer_memory
from tasks.params import RunParams
from tasks.spectra import read_spectrum
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


def described_query(described: Mapping[str, Any]) -> Query:
    """A query as `describe` wrote it."""
    parts = (
        tuple(described.get(f"{part}_tokens", ())) for part in ("prompt", "completion", "contrast")
    )
    return Query(described["name"], *parts)


def read_queries(context: StageContext) -> list[Query]:
    """All queries of a run, as stage `query` wrote them."""
    described = store.read_json(context.artifact("query") / "queries.json")
    return [described_query(query) for query in described]


def prepare_queries(
    context: StageContext,
    reference: PassReference,
    attributed: Attributed,
    queries: Sequence[Query],
    rank: int | None,
    methods: Sequence[str],
) -> dict[str, dict[str, LowRank]]:
    """Gradients of all queries, solved by each method and truncated to `rank`."""
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


@dataclass
class StoredSolvers(Mapping[str, EKFACBlock | Unreached]):
    """The EK-FAC of each layer, read when it is asked for; kept while the memory suffices.

    Args:
        eigen: the folder of that stage.
        correct: the folder of that stage.
        layers: whose solvers these are; each is on its layer's device.
        dtype: of a pass.
        memory: bytes of a device to keep them in. On a CPU what is read is the file itself, mapped.
    """

    eigen: Path
    correct: Path
    layers: Sequence[Layer]
    dtype: torch.dtype
    memory: int
    _held: dict[str, EKFACBlock] = field(default_factory=dict, init=False)
    _left: dict[torch.device, int] = field(default_factory=dict, init=False)

    def __getitem__(self, name: str) -> EKFACBlock | Unreached:
        if name in self._held:
            return self._held[name]
        [layer] = [each for each in self.layers if each.name == name]
        spectrum = read_spectrum(self.correct / "spectrum.safetensors", name)
        eigenvalues = spectrum.values.to(layer.device, self.dtype)
        if layer.is_routed and spectrum.is_zero:
            return Unreached(eigenvalues)
        basis = read_bases(self.eigen, [layer], self.dtype)[name]
        block = EKFACBlock(basis, eigenvalues)
        one = basis.Q_A.nbytes + basis.Q_S.nbytes + block.eigenvalues.nbytes
        left = self._left.get(layer.device, self.memory)
        if one <= left:
            self._held[name], self._left[layer.device] = block, left - one
        return block

    def __iter__(self) -> Iterator[str]:
        return iter([layer.name for layer in self.layers])

    def __len__(self) -> int:
        return len(self.layers)


def run_solvers(
    context: StageContext, reference: PassReference, layers: Sequence[Layer]
) -> StoredSolvers:
    """The run's EK-FAC, as a pass reads it."""
    return StoredSolvers(
        context.artifact("eigen"), context.artifact("correct"), layers,
        reference.dtype, layer_memory(context.params.runtime, reference.device),
    )  # fmt: skip


def write_prepared(path: Path, prepared: Mapping[str, Mapping[str, LowRank]]) -> None:
    """One pair of tensors a method and layer, the queries along the first axis."""
    tensors: dict[str, Tensor] = {}
    for method, layers in prepared.items():
        for layer, query in layers.items():
            tensors[f"{method}/{layer}/left"] = query.left
            tensors[f"{method}/{layer}/right"] = query.right
    store.write_tensors(path, tensors)


def read_prepared(
    path: Path, methods: Sequence[str], layers: Sequence[Layer], dtype: torch.dtype
) -> dict[str, LowRank]:
    """By layer and on its device, the queries of all `methods` one after another along the first
    axis."""

    def side(layer: Layer, name: str) -> Tensor:
        parts = [store.read_tensor(path, f"{method}/{layer.name}/{name}") for method in methods]
        return torch.cat(parts).to(layer.device, dtype)

    return {layer.name: LowRank(side(layer, "left"), side(layer, "right")) for layer in layers}


def concatenate(parts: Sequence[Path], path: Path) -> None:
    """Join files of prepared queries along the first axis, in the order given."""
    names = store.tensor_names(parts[0])
    store.write_tensors(
        path, {name: torch.cat([store.read_tensor(part, name) for part in parts]) for name in names}
    )
