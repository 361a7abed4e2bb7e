"""The corpus, read once: what stage `tokenize` keeps of its documents until they are tokenised.

Only its files can be taken apart before they are read: a compressed one has no middle to begin
at, and which line of its file a document is, is not known until those before it were read. So the
files are read in shards, each from its start to its end, and checked; the documents wait in tables,
of which `tokenize` takes any range. A byte of the corpus is asked for once, from wherever it is.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.corpora import Corpus, Document, check_ids, documents
from tasks.records import data_files
from tasks.rowgroups import count_rows, read_range, read_row_groups, write_row_groups
from tasks.shards import ShardRef, map_shards, split
from tasks.workspace import StageContext

DOCUMENTS_AT_ONCE = 512
NAMES = {"document": "string", "place": "string"}
READ = {  # text and messages: one document may be larger than `string` can hold
    **NAMES,
    "text": "large_string",
    "prompt": "int64",
    "messages": "large_string",
    "metadata": "large_string",
}


def read_corpus(context: StageContext, corpus: Corpus) -> list[Path]:
    """Tables of all documents, in the order of the corpus; those that a killed stage had read stay.

    Raises:
        ValueError: a bad line, two documents with one id, or no document.
    """
    files = len(data_files(corpus.path))
    # Where the limit falls is known once the files before were read.
    num_shards = context.params.runtime.shards if corpus.limit is None else 1
    parts = map_shards(
        context, read_shard, split(files, num_shards), name="read", suffix=".parquet", items="files"
    )
    check_ids(corpus, _names(parts))
    return parts


def read_shard(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Read some files of the corpus, from start to end."""
    corpus = Corpus.of(context.params.corpus, context.root)
    files = data_files(corpus.path)
    read = documents(corpus, (files[item] for item in shard.counted()))

    def groups() -> Iterator[dict[str, Any]]:
        while group := list(itertools.islice(read, DOCUMENTS_AT_ONCE)):
            yield {
                "document": [each.id for each in group],
                "place": [each.place for each in group],
                "text": [each.text for each in group],
                "prompt": [each.prompt for each in group],
                "messages": [_packed(each.messages) for each in group],
                "metadata": [_packed(each.metadata) for each in group],
            }

    write_row_groups(path, groups(), READ)


def num_read(parts: Sequence[Path]) -> int:
    """How many documents there are in tables of them."""
    return sum(map(count_rows, parts))


def documents_read(parts: Sequence[Path], start: int, stop: int) -> Iterator[list[Document]]:
    """The documents from `start` up to `stop` of tables end to end, some at a time."""
    for batch in read_range(parts, list(READ), start, stop):
        yield [_unpacked(row) for row in batch.to_pylist()]


def _names(parts: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for batch in read_row_groups(part, list(NAMES), DOCUMENTS_AT_ONCE):
            yield from zip(*(batch[name].to_pylist() for name in NAMES), strict=True)


def _packed(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unpacked(row: dict[str, Any]) -> Document:
    return Document(
        id=row["document"],
        text=row["text"],
        metadata=json.loads(row["metadata"]),
        place=row["place"],
        prompt=row["prompt"],
        messages=tuple(json.loads(row["messages"])),
    )
