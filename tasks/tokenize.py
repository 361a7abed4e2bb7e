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
from tasks.corpora import Corpus, documents, survey
from tasks.faraway import check_record, is_far
from tasks.material import Tokenize
from tasks.models import boundary_token, load_tokenizer
from tasks.shards import ShardRef, map_shards, split
from tasks.windows import Encoded, Windows, cut_windows, encode, sequence_keys
from tasks.workspace import StageContext

_DOCUMENTS_AT_ONCE = 512


def run(context: StageContext) -> None:
    """Tokenise the corpus in shards, then cut the whole of it into sequences.

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
    num_documents = survey(corpus)
    parts = map_shards(
        context,
        tokenize_shard,
        split(num_documents, params.runtime.shards),
        suffix=".parquet",
        items="documents",
    )
    names, metadata, encoded = _read_parts(parts)
    windows = cut_windows(names, encoded, params.tokenize.mode, params.tokenize.context)
    if not windows.supervised.any():
        raise ValueError(
            f"corpus.path: {corpus.path}: no sequence of its {num_documents} documents has two "
            "tokens, so that nothing is predicted; is that the field with the text?"
        )
    _write(context.out, windows, names, metadata)
    store.write_json(
        context.out / "summary.json",
        {
            # After the last read: what changed in between stops the run here.
            "corpus": lineage(params.corpus.path, context.root),
            "num_documents": num_documents,
            "num_sequences": len(windows.names),
            "num_tokens": len(windows.tokens),
            "num_supervised": int(windows.supervised.sum()),
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


def tokenize_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Tokenise a range of documents and write them with their names and metadata."""
    settings = context.params.tokenize
    corpus = Corpus.of(context.params.corpus, context.root)
    tokenizer = load_tokenizer(read_reference(context.artifact("train"), context.root).folder)
    stream = documents(corpus, shard.items[0], shard.items[-1] + 1)
    names: list[str] = []
    metadata: list[str] = []
    encoded: list[Encoded] = []
    while group := list(itertools.islice(stream, _DOCUMENTS_AT_ONCE)):
        names += [document.id for document in group]
        metadata += [json.dumps(document.metadata, ensure_ascii=False) for document in group]
        encoded += encode(tokenizer, group, settings.bos, settings.eos)
        shard.tick(len(group))
    store.write_table(
        path,
        {
            "document": names,
            "metadata": metadata,
            "tokens": [each.tokens for each in encoded],
            "targets": [each.targets.astype(np.uint8) for each in encoded],
        },
        {
            "document": "string",
            "metadata": "string",
            "tokens": "list<int32>",
            "targets": "list<uint8>",
        },
    )


def _read_parts(parts: Iterable[Path]) -> tuple[list[str], list[str], list[Encoded]]:
    """Names, metadata and tokens of all documents, in the order of the corpus."""
    names: list[str] = []
    metadata: list[str] = []
    encoded: list[Encoded] = []
    for part in parts:
        table = store.read_table(part).combine_chunks()
        names += table["document"].to_pylist()
        metadata += table["metadata"].to_pylist()
        for tokens, targets in zip(_rows(table["tokens"]), _rows(table["targets"]), strict=True):
            encoded.append(Encoded(tokens, targets.astype(np.bool_)))
    return names, metadata, encoded


def _rows(column: Any) -> Iterator[NDArray[Any]]:
    """The lists of a column."""
    for chunk in column.chunks:
        flat, ends = chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy().cumsum()
        yield from np.split(flat, ends[:-1])


def _write(out: Path, windows: Windows, names: list[str], metadata: list[str]) -> None:
    supervised, lengths = windows.supervised, np.diff(windows.offsets)
    store.write_tensors(
        out / "tokens.safetensors",
        {
            "tokens": torch.from_numpy(windows.tokens),
            "supervised": torch.from_numpy(supervised.astype(np.uint8)),
            "offsets": torch.from_numpy(windows.offsets),
        },
    )
    store.write_table(
        out / "sequences.parquet",
        {
            "key": sequence_keys(windows.names),
            "sequence": windows.names,
            "documents": windows.documents,
            "num_tokens": lengths,
            "num_supervised": np.add.reduceat(supervised.astype(np.int64), windows.offsets[:-1]),
        },
        {
            "key": "int64",
            "sequence": "string",
            "documents": "list<string>",
            "num_tokens": "int64",
            "num_supervised": "int64",
        },
    )
    store.write_table(
        out / "documents.parquet",
        {"document": names, "metadata": metadata},
        {"document": "string", "metadata": "string"},
    )
