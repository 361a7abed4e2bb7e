"""Stage `query`: gradients of log p(completion | prompt), preconditioned and truncated."""

from collections.abc import Sequence
from pathlib import Path

import torch

from influence.objectives import forward
from influence.queries import Query, measured, query_batch
from tasks import store
from tasks.attributed import PassReference
from tasks.generated import queries_of
from tasks.params import MAX_SHARDS
from tasks.prepared import (
    concatenate,
    damping_of,
    methods_of,
    prepare_queries,
    write_prepared,
)
from tasks.querysets import QueryText
from tasks.shards import ShardRef, map_shards, split
from tasks.spectra import read_spectrum
from tasks.workspace import StageContext

QUERIES_PER_SHARD = 32  # a dense gradient of every query and layer is in memory at once


def run(context: StageContext) -> None:
    """Prepare every query by EK-FAC, at every λ, and by gradient dot product, as a baseline."""
    reference = PassReference.of(context)
    texts = queries_of(context, reference.model)
    damping = damping_of(context.params)
    shards = split(len(texts), num_shards(len(texts)))
    parts = map_shards(context, prepare_shard, shards, items="queries")
    concatenate(parts, context.out / "prepared.safetensors")
    store.write_json(context.out / "queries.json", describe(texts, reference))
    file = context.artifact("correct") / "spectrum.safetensors"
    dampings: dict[str, float] = {}
    for layer in reference.attributed().layers:
        spectrum = read_spectrum(file, layer.name)
        if not (layer.is_routed and spectrum.is_zero):  # an expert that was not reached has none
            dampings[layer.name] = damping.of(spectrum.values)
    store.write_json(context.out / "damping.json", dict(sorted(dampings.items())))


def num_shards(num_queries: int) -> int:
    """Few enough queries at a time that their dense gradients fit into memory."""
    return min(MAX_SHARDS, -(-num_queries // QUERIES_PER_SHARD))


def prepare_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Prepare some of the queries."""
    reference = PassReference.of(context)
    texts = queries_of(context, reference.model)
    chosen = [as_query(texts[item]) for item in shard.items]
    rank, methods = context.params.query.rank, methods_of(context.params)
    write_prepared(
        path, prepare_queries(context, reference, reference.attributed(), chosen, rank, methods)
    )


def as_query(text: QueryText) -> Query:
    """The query without its text."""
    return Query(text.name, text.prompt_tokens, text.completion_tokens, text.contrast_tokens)


def describe(texts: Sequence[QueryText], reference: PassReference) -> list[dict[str, object]]:
    """What people and later stages want to know of each query, with f under the model."""
    model = reference.attributed().model
    described: list[dict[str, object]] = []
    for text in texts:
        batch = query_batch([as_query(text)]).to(reference.input_device)
        with torch.no_grad():
            outputs = forward(model, batch)
            f = float(measured(outputs, batch.to(outputs.device), 1).sum())
        described.append(
            {
                "name": text.name,
                "prompt": text.prompt,
                "completion": text.completion,
                "prompt_tokens": list(text.prompt_tokens),
                "completion_tokens": list(text.completion_tokens),
                "log_probability": f,
                **_told(text),
                **text.extra,
            }
        )
    return described


def _told(text: QueryText) -> dict[str, object]:
    """What only some queries have."""
    told: dict[str, object] = {}
    if text.contrast:
        told |= {"contrast": text.contrast, "contrast_tokens": list(text.contrast_tokens)}
    if text.is_generated:
        told["generated"] = True
    if text.tags:
        told["tags"] = list(text.tags)
    if text.expected:
        told["expected"] = list(text.expected)
    return told
