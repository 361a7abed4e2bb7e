"""Stage `correct`: the corrected eigenvalues Λ of every layer, from fresh pseudo-gradients."""

from pathlib import Path

from influence.spectrum import fit_spectra
from tasks.attributed import PassReference
from tasks.eigens import read_bases
from tasks.precision import dtype_at_rest
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.spectra import add_spectra, read_spectra, write_spectra
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Fit on `correct.sequences` random sequences; write sums."""
    tokens = TokenStore.open(context.artifact("tokenize"))
    fit = context.params.correct
    rows = tokens.fit_rows(fit.sequences, fit.seed)
    shards = shards_of(tokens.shard_rows(rows, context.params.runtime.shards))
    parts = map_shards(context, correct_shard, shards)
    spectra = add_spectra(map(read_spectra, parts))
    write_spectra(context.out / "spectrum.safetensors", spectra, dtype_at_rest(context.params))


def correct_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Sums of one shard's sequences."""
    reference = PassReference.of(context)
    batches = reference.batches(shard.items, shard.tick)
    seed = context.params.correct.seed
    with reference.passes() as attributed:
        bases = read_bases(
            context.artifact("eigen"), attributed.layers, reference.dtype, reference.device
        )
        spectra = fit_spectra(attributed.model, attributed.layers, bases, batches, seed)
    write_spectra(path, spectra)
