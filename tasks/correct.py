"""Stage `correct`: the corrected eigenvalues Λ of every layer, from fresh pseudo-gradients."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from influence.spectrum import fit_spectra
from tasks import store
from tasks.attributed import Attributed, PassReference
from tasks.eigens import read_bases
from tasks.layergroups import passes_by_group, spectrum_bytes
from tasks.precision import dtype_at_rest
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.spectra import add_spectra, spectrum_tensors
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Fit on `correct.sequences` random sequences; write sums."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    fit = context.params.correct
    rows = tokens.fit_rows(fit.sequences, fit.seed)
    shards = shards_of(tokens.shard_rows(rows, context.params.runtime.shards))
    parts = map_shards(context, correct_shard, shards)
    add_spectra(parts, context.out / "spectrum.safetensors", dtype_at_rest(context.params))


def correct_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Sums of one shard's sequences."""
    reference = PassReference.of(context)
    seed = context.params.correct.seed
    eigen = context.artifact("eigen")

    def fitted(attributed: Attributed) -> Iterator[tuple[str, Tensor]]:
        for layers, tick in passes_by_group(
            context, reference, attributed.layers, shard, spectrum_bytes
        ):
            batches = reference.batches(shard.items, tick)
            bases = read_bases(eigen, layers, reference.dtype)
            yield from spectrum_tensors(fit_spectra(attributed.model, layers, bases, batches, seed))

    with reference.passes() as attributed:
        store.write_tensors_in_turn(path, fitted(attributed))
