"""Records of files: JSON lines, text, parquet and saved datasets, each record with its place.

Every fault of the input names the file, the line, what was found and what was wanted.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tasks.faraway import FarFile, far_files

FORMATS = (".jsonl", ".txt", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")  # of .jsonl and .txt
WANTED = f"{', '.join(FORMATS[:3])} (the first two also {' and '.join(COMPRESSED)})"
CHUNK = 1 << 20
ROWS = 256  # of a table, in memory at once

File = Path | FarFile


@dataclass(frozen=True, slots=True)
class Record:
    """One object and the place it was read from, ``file:line``."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unread:
    """What may become a record: to pass it over costs no parsing."""

    place: str
    content: bytes | dict[str, Any]

    def read(self) -> Record:
        """The record.

        Raises:
            ValueError: naming the place, if there is no JSON object.
        """
        if isinstance(self.content, bytes):
            return Record(self.place, _parsed(self.place, self.content))
        return Record(self.place, _plain(self.content))


def unread(path: Path | str, separator: str | None = None) -> Iterator[Unread]:
    """What a file or folder holds, blank lines and blank texts left out.

    Args:
        path: a file, a folder of them (read in sorted order), or a dataset as `save_to_disk` of
            Hugging Face's datasets leaves it; or the URL of one of these, read as it streams in.
        separator: of the documents of a .txt file; None: the file is one document.

    Raises:
        ValueError: naming file and line.
    """
    for name, file in _files(path):
        try:
            yield from _READERS[_format(file)](name, file, separator)
        except (OSError, EOFError, zlib.error) as error:  # pyarrow's errors of reading are OSErrors
            raise ValueError(f"{file}: cannot be read ({error})") from error


def records(path: Path | str) -> Iterator[Record]:
    """The records of a file or folder."""
    return (each.read() for each in unread(path))


def _lines(name: str, file: File, separator: str | None) -> Iterator[Unread]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Unread(f"{name}:{number}", line)


def _texts(name: str, file: File, separator: str | None) -> Iterator[Unread]:
    """Documents of a text, which need not fit into memory together."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _opened(file) as stream:
        rest, line, ended = "", 1, False
        while not ended:
            chunk = stream.read(CHUNK)
            ended = not chunk
            try:
                rest += decoder.decode(chunk, final=ended)
            except UnicodeError as error:
                raise ValueError(f"{file}: not UTF-8 text ({error})") from error
            found = rest.split(separator) if separator else [rest]
            rest = "" if ended else found.pop()
            for text in found:
                # A document begins where its text does, not where the separator ends.
                start = line + text[: len(text) - len(text.lstrip())].count("\n")
                if text.strip():
                    yield Unread(f"{name}:{start}" if separator else name, {"text": text})
                line += text.count("\n") + (separator.count("\n") if separator else 0)


def _table(name: str, file: File, separator: str | None) -> Iterator[Unread]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with ExitStack() as open_files:
            source = file if isinstance(file, Path) else open_files.enter_context(file.open())
            yield from _rows(name, pq.ParquetFile(source).iter_batches(batch_size=ROWS))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: no complete parquet file ({error})") from error


def _arrow(name: str, file: File, separator: str | None) -> Iterator[Unread]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) if isinstance(file, Path) else file.open() as source:
            yield from _rows(name, iter(pa.ipc.open_stream(source)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: no complete Arrow stream ({error})") from error


def _rows(name: str, batches: Iterator[Any]) -> Iterator[Unread]:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield Unread(f"{name}:{number}", fields)


_READERS = {".jsonl": _lines, ".txt": _texts, ".parquet": _table, ".arrow": _arrow}


def _opened(file: File) -> BinaryIO:
    source: Any = file if isinstance(file, Path) else file.open()
    if file.suffix == ".gz":
        return gzip.open(source)  # pyright: ignore[reportReturnType]  a GzipFile is one
    if file.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(source, compression="zstd"))  # pyright: ignore
    return source.open("rb") if isinstance(source, Path) else source


def _parsed(place: str, line: bytes) -> dict[str, Any]:
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
    except RecursionError as error:
        raise ValueError(f"{place}: JSON nested too deep to be read") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{place}: a JSON {type(fields).__name__}; one JSON object a line is wanted"
        )
    return fields


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say: dates and the like of a table become text."""
    return json.loads(json.dumps(fields, default=str), parse_constant=lambda _: None)


def _format(file: File) -> str:
    """`.jsonl` of `x.jsonl.gz`; empty for a file that is none of ours."""
    compressed = file.suffix in COMPRESSED
    found = Path(file.stem).suffix if compressed else file.suffix
    allowed = FORMATS[:2] if compressed else FORMATS
    return found if found in allowed else ""


def data_files(path: Path | str) -> list[File]:
    """The files that `unread` reads, in its order.

    Raises:
        ValueError: none there.
    """
    return [file for _, file in _files(path)]


def _files(path: Path | str) -> list[tuple[str, File]]:
    """Files with the names that errors and unnamed documents call them by."""
    if isinstance(path, str):
        return _chosen(path, dict(far_files(path)))
    if path.is_file():
        return _chosen(path, {path.name: path})
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; a file of {WANTED} is wanted")
    inside = (file for file in path.rglob("*") if file.is_file())
    return _chosen(path, {file.relative_to(path).as_posix(): file for file in inside})


def _chosen(path: Path | str, inside: Mapping[str, File]) -> list[tuple[str, File]]:
    """Those of the files at a path that hold records, in their order."""
    if len(inside) == 1 and str(next(iter(inside.values()))) == str(path):
        if not all(map(_format, inside.values())):
            raise ValueError(f"{path}: a file that ends in one of {WANTED} is wanted")
        return list(inside.items())
    if "dataset_dict.json" in inside:
        splits = sorted(name.split("/")[0] for name in inside if name.endswith("/state.json"))
        raise ValueError(
            f"{path}: a saved dataset of several splits ({', '.join(splits)}); give one, such as "
            f"{path}/{(splits or ['train'])[0]}"
        )
    if "state.json" in inside:  # which of a saved dataset's files belong to it, and their order
        with inside["state.json"].open("rb") as state:
            names = [each["filename"] for each in json.loads(state.read())["_data_files"]]
        return [(name, inside[name]) for name in names]
    found = sorted(
        ((name, file) for name, file in inside.items() if _format(file) in FORMATS[:3]),
        key=lambda each: each[0],
    )
    if not found:
        raise ValueError(f"{path}: no file in this folder ends in one of {WANTED}")
    texts = [name for name, file in found if _format(file) == ".txt"]
    if 0 < len(texts) < len(found):  # a LICENSE.txt beside the data must not become a document
        other = next(name for name, _ in found if name not in texts)
        raise ValueError(
            f"{path}: this folder holds plain text ({texts[0]}) beside records ({other}); give a "
            "file or folder of one kind"
        )
    return found
