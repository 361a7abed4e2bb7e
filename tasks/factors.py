"""Stage `factors`: Kronecker factors A and S of every layer, from pseudo-gradients."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from influence.factors import fit_factors
from influence.layers import Coverage, Layer
from tasks import store
from tasks.attributed import Attributed, PassReference
from tasks.kronecker import add_factors, factor_tensors
from tasks.layergroups import factor_bytes, passes_by_group
from tasks.precision import dtype_at_rest
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, map_shards, shards_of
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    """Fit on `factors.sequences` random sequences; write sums, layers and coverage."""
    reference = PassReference.of(context)
    attributed = reference.attributed()
    tokens = TokenStore.open(context.artifact("tokenize"))
    fit = context.params.factors
    rows = tokens.fit_rows(fit.sequences, fit.seed)
    shards = shards_of(tokens.shard_rows(rows, context.params.runtime.shards))
    parts = map_shards(context, fit_shard, shards)
    # In the order of the shards and in float64, so that the sum does not depend on the workers.
    file = context.out / "factors.safetensors"
    num_tokens = add_factors(parts, file, dtype_at_rest(context.params))
    store.write_json(
        context.out / "layers.json",
        {
            "layers": [layer_fields(layer) for layer in attributed.layers],
            "coverage": coverage_fields(attributed.coverage),
            "num_sequences": len(rows),
            "num_tokens": num_tokens,
        },
    )


def fit_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Sums of one shard's sequences."""
    reference = PassReference.of(context)
    seed = context.params.factors.seed

    def fitted(attributed: Attributed) -> Iterator[tuple[str, Tensor]]:
        for layers, tick in passes_by_group(
            context, reference, attributed.layers, shard, factor_bytes
        ):
            batches = reference.batches(shard.items, tick)
            yield from factor_tensors(fit_factors(attributed.model, layers, batches, seed))

    with reference.passes() as attributed:
        store.write_tensors_in_turn(path, fitted(attributed))


def layer_fields(layer: Layer) -> dict[str, str | int | bool]:
    """A layer without its module."""
    return {
        "name": layer.name,
        "d_in": layer.d_in,
        "d_out": layer.d_out,
        "has_bias": layer.has_bias,
        "input_group": layer.input_group,
    }


def coverage_fields(coverage: Coverage) -> dict[str, object]:
    """Coverage as every artefact's header states it."""
    return {
        "share": coverage.share,
        "num_attributed": coverage.num_attributed,
        "num_parameters": coverage.num_parameters,
        "attributed": list(coverage.attributed),
        "left_out": [
            {"name": left.name, "num_parameters": left.num_parameters, "reason": left.reason}
            for left in coverage.left_out
        ],
    }
