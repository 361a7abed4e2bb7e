"""Records of files: JSON lines, text, parquet and saved datasets, each record with its place.

Every fault of the input names the file, the line, what was found and what was wanted.
"""

import codecs
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
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


class UnreadableError(ValueError):
    """A fault of the input; the message names the file."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of records, and what errors and unnamed documents call it."""

    name: str
    file: File


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


def unread(files: Iterable[DataFile], separator: str | None = None) -> Iterator[Unread]:
    """What files hold, each read once from its start; blank lines and blank texts are left out.

    Args:
        files: in their order; each is opened when the one before it has ended.
        separator: of the documents of a .txt file; None: the file is one document.

    Raises:
        ValueError: naming file and line.
    """
    for each in files:
        try:
            yield from _READERS[_format(each.file)](each, separator)
        except UnreadableError:
            raise
        except Exception as error:  # of gzip, pyarrow, and of whatever reads from far away
            kind = type(error).__name__
            raise UnreadableError(
                f"{each.file}: cannot be read ({kind}: {error}); see whether it is whole and can "
                "be reached, or write it again"
            ) from error


def records(path: Path | str) -> Iterator[Record]:
    """The records of a file or folder."""
    return (each.read() for each in unread(data_files(path)))


def _lines(source: DataFile, separator: str | None) -> Iterator[Unread]:
    with _opened(source.file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Unread(f"{source.name}:{number}", line)


def _texts(source: DataFile, separator: str | None) -> Iterator[Unread]:
    """Documents of a text, which need not fit into memory together."""
    decoder, name = codecs.getincrementaldecoder("utf-8-sig")(), source.name
    with _opened(source.file) as stream:
        rest, line, ended = "", 1, False
        while not ended:
            chunk = stream.read(CHUNK)
            ended = not chunk
            try:
                rest += decoder.decode(chunk, final=ended)
            except UnicodeError as error:
                raise UnreadableError(
                    f"{source.file}: not UTF-8 text ({error}); save it as UTF-8"
                ) from error
            found = rest.split(separator) if separator else [rest]
            rest = "" if ended else found.pop()
            for text in found:
                # A document begins where its text does, not where the separator ends.
                start = line + text[: len(text) - len(text.lstrip())].count("\n")
                if text.strip():
                    yield Unread(f"{name}:{start}" if separator else name, {"text": text})
                line += text.count("\n") + (separator.count("\n") if separator else 0)


def _table(source: DataFile, separator: str | None) -> Iterator[Unread]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = source.file
    try:
        with ExitStack() as open_files:
            opened = file if isinstance(file, Path) else open_files.enter_context(file.open())
            # What is buffered before it is used stays in memory: a group of rows, not the file.
            table = pq.ParquetFile(opened, pre_buffer=isinstance(file, FarFile))
            groups = ([number] for number in range(table.num_row_groups))
            batches = (table.iter_batches(ROWS, row_groups=group) for group in groups)
            yield from _rows(source.name, itertools.chain.from_iterable(batches))
    except pa.ArrowInvalid as error:
        raise UnreadableError(
            f"{file}: no complete parquet file ({error}); write it again"
        ) from error


def _arrow(source: DataFile, separator: str | None) -> Iterator[Unread]:
    import pyarrow as pa

    file = source.file
    try:
        with pa.memory_map(str(file)) if isinstance(file, Path) else file.stream() as opened:
            yield from _rows(source.name, iter(pa.ipc.open_stream(opened)))
    except pa.ArrowInvalid as error:
        raise UnreadableError(
            f"{file}: no complete Arrow stream ({error}); save it again"
        ) from error


def _rows(name: str, batches: Iterator[Any]) -> Iterator[Unread]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts a damaged file, and reads past the end of memory
        for fields in batch.to_pylist():
            number += 1
            yield Unread(f"{name}:{number}", fields)


_READERS = {".jsonl": _lines, ".txt": _texts, ".parquet": _table, ".arrow": _arrow}


def _opened(file: File) -> BinaryIO:
    source: Any = file if isinstance(file, Path) else file.stream()
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
        raise ValueError(f"{place}: not UTF-8 text ({error}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        shown = line[:60].decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): {shown!r}; "
            "one JSON object a line is wanted"
        ) from error
    except ValueError as error:  # Python's own bound on the digits of a number
        raise ValueError(
            f"{place}: a number that cannot be read ({error}); write it as text"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place}: JSON nested too deep to be read; flatten it") from error
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


def data_files(path: Path | str) -> list[DataFile]:
    """The files of records at a path, in the order in which they are read.

    Args:
        path: a file, a folder of them (read in sorted order), or a dataset as `save_to_disk` of
            Hugging Face's datasets leaves it; or the URL of one of these.

    Raises:
        ValueError: none there.
    """
    if isinstance(path, str):
        return _chosen(path, dict(far_files(path)))
    if path.is_file():
        return _chosen(path, {path.name: path})
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; a file of {WANTED} is wanted")
    inside = (file for file in path.rglob("*") if file.is_file())
    return _chosen(path, {file.relative_to(path).as_posix(): file for file in inside})


def _saved(state: File, inside: Mapping[str, File]) -> list[DataFile]:
    """Which of a saved dataset's files belong to it, and their order."""
    try:
        with state.open("rb") as stream:
            names = [each["filename"] for each in json.loads(stream.read())["_data_files"]]
        if not names:
            raise ValueError("it names no file")
        return [DataFile(name, inside[name]) for name in names]
    except Exception as error:  # no JSON, no such key, no such file, or no file that can be read
        raise ValueError(
            f"{state}: does not name the files of a saved dataset ({type(error).__name__}: "
            f"{error}); save the dataset again with save_to_disk"
        ) from error


def _chosen(path: Path | str, inside: Mapping[str, File]) -> list[DataFile]:
    """Those of the files at a path that hold records, in their order."""
    if len(inside) == 1 and str(next(iter(inside.values()))) == str(path):
        if not all(map(_format, inside.values())):
            raise ValueError(f"{path}: a file that ends in one of {WANTED} is wanted")
        return [DataFile(*each) for each in inside.items()]
    if "dataset_dict.json" in inside:
        splits = sorted(name.split("/")[0] for name in inside if name.endswith("/state.json"))
        raise ValueError(
            f"{path}: a saved dataset of several splits ({', '.join(splits)}); give one, such as "
            f"{path}/{(splits or ['train'])[0]}"
        )
    if "state.json" in inside:
        return _saved(inside["state.json"], inside)
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
    return [DataFile(*each) for each in found]
