"""Stage `tokenize`: documents to sequences of tokens, with names that last to the final table."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks import store
from tasks.checkpoints import ModelReference, read_reference
from tasks.corpora import Corpus
from tasks.faraway import check_record, is_far
from tasks.material import Tokenize
from tasks.models import boundary_token, load_tokenizer
from tasks.reading import DOCUMENTS_AT_ONCE, documents_read, num_read, read_corpus
from tasks.rowgroups import read_row_groups, write_row_groups
from tasks.shards import ShardRef, map_shards, split
from tasks.windows import Plan, encode, plan_windows, sequence_keys
from tasks.workspace import StageContext

TOLD = {"document": "string", "metadata": "string"}
PART = {**TOLD, "tokens": "list<int32>", "targets": "list<uint8>"}


def run(context: StageContext) -> None:
    """Read the corpus, tokenise it in shards, then cut the whole of it into sequences.

    Cutting comes last, so that the sequences do not depend on the number of shards.

    Raises:
        ValueError: a bad line of the corpus, no tokens in it, a context longer than the model's,
            BOS or EOS that the tokenizer has not or that the text holds already, two sequences
            with one name.
    """
    params = context.params
    model = read_reference(context.artifact("train"), context.root)
    check_settings(params.tokenize, model)
    corpus = Corpus.of(params.corpus, context.root)
    if is_far(params.corpus.path):
        check_record(context.root, params.corpus.path)
    read = read_corpus(context, corpus)
    num_documents = num_read(read)
    parts = map_shards(
        context,
        tokenize_shard,
        split(num_documents, params.runtime.shards),
        suffix=".parquet",
        items="documents",
        read=[part.name for part in read],
    )
    settings = params.tokenize
    plan = plan_windows(*read_index(parts), settings.mode, settings.context)
    supervised = write_tokens(context, parts, plan.offsets)
    if not supervised.any():
        raise ValueError(
            f"corpus.path: {corpus.path}: no sequence of its {num_documents} documents has two "
            "tokens, so that nothing is predicted; is that the field with the text?"
        )
    write_sequences(context.out / "sequences.parquet", plan, supervised)
    write_row_groups(context.out / "documents.parquet", _told(parts), TOLD)
    store.write_json(
        context.out / "summary.json",
        {
            # After the last read: what changed in between stops the run here.
            "corpus": lineage(params.corpus.path, context.root),
            "num_documents": num_documents,
            "num_sequences": len(plan.names),
            "num_tokens": int(plan.offsets[-1]),
            "num_supervised": int(supervised.sum()),
            **params.tokenize.model_dump(),
        },
    )


def lineage(path: str, root: Path) -> dict[str, Any]:
    """What artefacts say of where the corpus is and what it holds.

    Raises:
        ValueError: a far corpus is not what its description says.
    """
    if is_far(path):
        return check_record(root, path)
    return {"path": path, "digest": store.digest(root / path)}


def check_settings(settings: Tokenize, model: ModelReference) -> None:
    """Whether the model can read what the settings ask for, before any document is read.

    Raises:
        ValueError: naming the setting.
    """
    if model.context is not None and settings.context > model.context:
        raise ValueError(
            f"tokenize.context is {settings.context}, but the model reads at most "
            f"{model.context} tokens; set it to {model.context} or less"
        )
    tokenizer = load_tokenizer(model.folder)
    if settings.bos:
        boundary_token(tokenizer, "bos")
    if settings.eos:
        boundary_token(tokenizer, "eos")


def tokenize_shard(context: StageContext, shard: ShardRef, path: Path, read: list[str]) -> None:
    """Tokenise a range of the documents in the tables `read`; write names and metadata too."""
    settings = context.params.tokenize
    tokenizer = load_tokenizer(read_reference(context.artifact("train"), context.root).folder)
    parts = [context.work / name for name in read]

    def groups() -> Iterator[dict[str, Any]]:
        for group in documents_read(parts, shard.items[0], shard.items[-1] + 1):
            encoded = encode(tokenizer, group, settings.bos, settings.eos)
            yield {
                "document": [each.id for each in group],
                "metadata": [json.dumps(each.metadata, ensure_ascii=False) for each in group],
                "tokens": [each.tokens for each in encoded],
                "targets": [each.targets.astype(np.uint8) for each in encoded],
            }
            shard.tick(len(group))

    write_row_groups(path, groups(), PART)


def read_index(parts: Iterable[Path]) -> tuple[list[str], NDArray[np.int64]]:
    """Name and number of tokens of each document, in the order of the corpus."""
    names: list[str] = []
    lengths = [np.zeros(0, np.int64)]
    for batch in _batches(parts, ["document", "tokens"]):
        names += batch["document"].to_pylist()
        lengths.append(batch["tokens"].value_lengths().to_numpy().astype(np.int64))
    return names, np.concatenate(lengths)


def write_tokens(
    context: StageContext, parts: Iterable[Path], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Write tokens.safetensors by way of files, for a corpus that memory does not hold.

    Returns:
        The number of supervised tokens of each sequence.
    """
    files = context.work / "tokens.raw", context.work / "supervised.raw"
    counts = np.zeros(len(offsets) - 1, np.int64)
    with files[0].open("wb") as tokens, files[1].open("wb") as supervised:
        for batch, flat in _supervised(parts, offsets, counts):
            tokens.write(batch["tokens"].flatten().to_numpy().data)
            supervised.write(flat.data)
    if len(counts):  # an empty file cannot be mapped
        mapped = np.memmap(files[0], np.int32, "r+"), np.memmap(files[1], np.uint8, "r+")
        tensors = zip(("offsets", "tokens", "supervised"), (offsets, *mapped), strict=True)
        store.write_tensors_in_turn(
            context.out / "tokens.safetensors",
            ((name, torch.from_numpy(values)) for name, values in tensors),
        )
    for file in files:
        file.unlink()
    return counts


def _supervised(
    parts: Iterable[Path], offsets: NDArray[np.int64], counts: NDArray[np.int64]
) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
    """Some documents at a time, with which of their tokens are supervised; counts them."""
    begin = 0
    for batch in _batches(parts, ["tokens", "targets"]):
        flat = batch["targets"].flatten().to_numpy().copy()
        end = begin + len(flat)
        first, last = np.searchsorted(offsets[:-1], [begin, end])
        flat[offsets[first:last] - begin] = 0  # nothing predicts the first of a sequence
        window = np.searchsorted(offsets, np.arange(begin, end), side="right") - 1
        np.add.at(counts, window, flat)
        yield batch, flat
        begin = end


def write_sequences(path: Path, plan: Plan, supervised: NDArray[np.int64]) -> None:
    """One row a sequence: what the rest of the pipeline calls it."""
    store.write_table(
        path,
        {
            "key": sequence_keys(plan.names),
            "sequence": plan.names,
            "documents": plan.documents,
            "num_tokens": np.diff(plan.offsets),
            "num_supervised": supervised,
        },
        {
            "key": "int64",
            "sequence": "string",
            "documents": "list<string>",
            "num_tokens": "int64",
            "num_supervised": "int64",
        },
    )


def _told(parts: Iterable[Path]) -> Iterator[dict[str, list[str]]]:
    """Names and metadata, in groups that do not depend on the shards."""
    rows = (row for batch in _batches(parts, list(TOLD)) for row in batch.to_pylist())
    while group := list(itertools.islice(rows, DOCUMENTS_AT_ONCE)):
        yield {name: [row[name] for row in group] for name in TOLD}


def _batches(parts: Iterable[Path], columns: list[str]) -> Iterator[Any]:
    for part in parts:
        yield from read_row_groups(part, columns, DOCUMENTS_AT_ONCE)
