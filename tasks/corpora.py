"""Reading JSONL: the corpus, one document a line, and whatever else comes a JSON object a line.

Every fault of the input names the file, the line, what was found and what was wanted.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import params

_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and the place it was read from, ``file:line``."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where the documents are and how to read them.

    Args:
        path: a ``.jsonl`` or ``.jsonl.gz`` file, or a folder of them, read in sorted order.
        text: the field that holds the text.
        id: the field that holds the document's name; None names a document ``file:line``.
        limit: read only so many documents; None reads all.
    """

    path: Path
    text: str
    id: str | None
    limit: int | None

    @classmethod
    def of(cls, section: params.Corpus, root: Path) -> "Corpus":
        """The corpus of a run; its path is relative to the project's root."""
        return cls(root / section.path, section.text, section.id, section.limit)


@dataclass(frozen=True, slots=True)
class Document:
    """One line of the corpus; `metadata` holds its other fields."""

    id: str
    text: str
    metadata: dict[str, Any]
    place: str


def documents(corpus: Corpus, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """The documents from `start` up to `stop`, counted over the whole corpus.

    Lines outside the range are passed over without being parsed. Duplicate ids are found by
    `survey`, which sees every line.

    Raises:
        ValueError: a line that is no document (file, line, what it lacks), or an unreadable path.
    """
    if corpus.limit is not None:
        stop = corpus.limit if stop is None else min(stop, corpus.limit)
    for place, line in itertools.islice(_lines(corpus.path), start, stop):
        yield _document(_parse(place, line), corpus)


def survey(corpus: Corpus) -> int:
    """Read every document once, so that a bad line stops the run before any long work.

    Returns:
        The number of documents.

    Raises:
        ValueError: as `documents`; also two documents with one id, and an empty corpus.
    """
    seen: dict[str, str] = {}
    for document in documents(corpus):
        if document.id in seen:
            raise ValueError(
                f"{document.place}: document id {document.id!r} was already used at "
                f"{seen[document.id]}; ids must be unique "
                "(or set corpus.id to null to name documents by file and line)"
            )
        seen[document.id] = document.place
    if not seen:
        raise ValueError(
            f"corpus.path: {corpus.path} holds no documents; at least one line with a JSON object "
            f"such as {{{json.dumps(corpus.text)}: ...}} is wanted"
        )
    return len(seen)


def records(path: Path) -> Iterator[Record]:
    """The JSON objects of a file or folder, blank lines skipped."""
    for place, line in _lines(path):
        yield _parse(place, line)


def _document(record: Record, corpus: Corpus) -> Document:
    fields = dict(record.fields)
    text = _take(record, fields, corpus.text, "corpus.text")
    if not isinstance(text, str):
        raise ValueError(
            f"{record.place}: field {corpus.text!r} (corpus.text) holds a "
            f"{type(text).__name__}; a string is wanted"
        )
    if corpus.id is None:
        return Document(record.place, text, fields, record.place)
    name = _take(record, fields, corpus.id, "corpus.id")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(
            f"{record.place}: field {corpus.id!r} (corpus.id) holds {name!r}; "
            "a string or a whole number is wanted"
        )
    return Document(str(name), text, fields, record.place)


def _take(record: Record, fields: dict[str, Any], key: str, setting: str) -> Any:
    if key not in fields:
        there = ", ".join(map(repr, record.fields)) or "none"
        raise ValueError(
            f"{record.place}: no field {key!r}, which {setting} names; fields there: {there}"
        )
    return fields.pop(key)


def _parse(place: str, line: bytes) -> Record:
    try:
        # NaN and Infinity, which some writers put for nothing, are no JSON: read as null.
        fields = json.loads(line.decode("utf-8-sig"), parse_constant=lambda _: None)
        # A lone surrogate (\ud83d) is legal JSON but no text: no tokenizer can encode it.
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        shown = line[:60].decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): {shown!r}; "
            "one JSON object a line is wanted"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{place}: a JSON {type(fields).__name__}; one JSON object a line is wanted"
        )
    return Record(place, fields)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, each with its place."""
    for name, file in _files(path):
        try:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{name}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from error


def _files(path: Path) -> list[tuple[str, Path]]:
    """Files with the names that errors and unnamed documents call them by."""
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; a .jsonl or .jsonl.gz file is wanted")
    found = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file() and file.name.endswith(_SUFFIXES)
    )
    if not found:
        raise ValueError(f"{path}: no file in this folder ends in {' or '.join(_SUFFIXES)}")
    return found
