"""The top and a control again: queries at full rank, and token grids of the top.

Queries of full rank are as large as the attributed layers, each of them: they are solved, kept and
met a group of layers at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from influence.layers import Layer
from influence.tokens import Rescored, rescore
from tasks import store
from tasks.attributed import PassReference
from tasks.layergroups import groups_of_layers, passes_by_group, solved_bytes
from tasks.prepared import EKFAC, prepare_queries, read_queries
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of, split
from tasks.workspace import StageContext


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence that is to be scored again for a query, and told token by token."""

    query: int
    row: int


def rescore_all(context: StageContext, pairs: list[Pair], controls: list[int]) -> list[Path]:
    """Full-rank scores of all rows wanted, and grids of all pairs; a file a shard of rows."""
    whole = split(1, 1)
    [solved] = map_shards(context, solved_shard, whole, name="full-rank", items="query sets")
    tokens = TokenStore.open(context.artifact("tokenize"))
    rows = sorted({pair.row for pair in pairs} | set(controls))
    return map_shards(
        context,
        rescore_shard,
        shards_of(tokens.shard_rows(rows, context.params.runtime.shards)),
        name="rescore",
        solved=solved.name,
        pairs=[[pair.query, pair.row] for pair in pairs],
    )


def solved_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """(G + λI)⁻¹∇f of all queries without truncation: by layer, a dense matrix a query."""
    reference, queries = PassReference.of(context), read_queries(context)
    attributed = reference.attributed()

    def solved() -> Iterator[tuple[str, Tensor]]:
        size = _size(len(queries), reference)
        for layers in groups_of_layers(context, reference, attributed.layers, size):
            some = replace(attributed, layers=layers)
            prepared = prepare_queries(context, reference, some, queries, None, [EKFAC])[EKFAC]
            for layer in layers:
                yield layer.name, prepared.pop(layer.name).dense()

    store.write_tensors_in_turn(path, solved())


def rescore_shard(
    context: StageContext, shard: ShardRef, path: Path, solved: str, pairs: list[list[int]]
) -> None:
    """`<row>/scores` of all queries, and `<row>/<query>` the layer × token grid of a pair."""
    reference = PassReference.of(context)
    attributed = reference.attributed()
    tokens = TokenStore.open(reference.tokenize)
    queries_of: dict[int, list[int]] = {}
    for query, row in pairs:
        queries_of.setdefault(row, []).append(query)
    size, told = _size(len(read_queries(context)), reference), Told()
    for layers, tick in passes_by_group(context, reference, attributed.layers, shard, size):
        held = {
            layer.name: store.read_tensor(context.work / solved, layer.name).to(
                layer.device, reference.dtype
            )
            for layer in layers
        }
        for batch, rows in reference.batches_with_rows(shard.items, tick):
            wanted = [(q, n) for n, row in enumerate(rows) for q in queries_of.get(row, ())]
            rescored = rescore(attributed.model, layers, held, batch, wanted, tokens.num_sequences)
            told.add(rows, rescored)
        told.layers.extend(layer.name for layer in layers)
    names = [layer.name for layer in attributed.layers]
    store.write_tensors(path, told.tensors(names, tokens.lengths))


def _size(num_queries: int, reference: PassReference) -> Callable[[Sequence[Layer]], int]:
    return partial(solved_bytes, num_queries=num_queries, itemsize=reference.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Told:
    """What each group of layers told of the rows, to be put side by side."""

    layers: list[str] = field(default_factory=list)
    scores: dict[int, list[Tensor]] = field(default_factory=dict)
    grids: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def add(self, rows: Sequence[int], rescored: Rescored) -> None:
        """Of a batch with these rows, by some of the layers."""
        for n, row in enumerate(rows):
            self.scores.setdefault(row, []).append(rescored.scores[:, n].cpu())
        for (q, n), grid in rescored.grids.items():
            self.grids.setdefault((rows[n], q), []).append(grid.cpu())

    def tensors(
        self, names: Sequence[str], lengths: Sequence[int] | Mapping[int, int]
    ) -> Mapping[str, Tensor]:
        """All layers in the order of `names`; scores summed over them, in float64."""
        order = [self.layers.index(name) for name in names]
        found = {
            f"{row}/scores": torch.cat(parts, dim=1).double().sum(dim=1)
            for row, parts in self.scores.items()
        }
        for (row, q), parts in self.grids.items():
            found[f"{row}/{q}"] = torch.cat(parts)[order, : lengths[row]]
        return found
