"""The only door to files of tensors (safetensors), tables (parquet) and JSON.

Whatever is written appears whole or not at all: it is written beside its target under a hidden
name and renamed. The same content gives the same bytes. A failed write says where and why, and
leaves nothing behind.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # torch and pyarrow are slow to import, and many a door needs neither
    import pyarrow as pa
    from torch import Tensor

CHUNK = 1 << 20
METADATA = "metadata"  # one key holding JSON: safetensors writes several keys in random order
DTYPES = {  # as the format of safetensors calls them
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "the file system is read-only; choose another place for the project",
    errno.EFBIG: "raise the limit on the size of a file",
}


class StorageError(OSError):
    """A file could not be written or read; the message is one sentence, `errno` the cause."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; renamed to `path` if the block succeeds.

    The file gets the mode that the umask asks for (safetensors alone would write 0600).

    Raises:
        StorageError: if the folder cannot be written or the disk is full; `path` is untouched.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden.touch()
        mode = hidden.stat().st_mode & 0o777
        yield hidden
        hidden.chmod(mode)
        hidden.replace(path)
    except (OSError, SafetensorError) as error:
        raise _explained(path, error) from error
    finally:
        with suppress(OSError):  # gone, or never there: the error above is the one to tell
            hidden.unlink()


def _explained(path: Path, error: OSError | SafetensorError) -> StorageError:
    """`error` with the path that was asked for and what to do."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        number = int(found.group(1)) if found else errno.EIO
    else:
        number = error.errno or errno.EIO
    advice = ADVICE.get(number, "see whether the folder can be written")
    return StorageError(
        number,
        f"cannot write {path}: {os.strerror(number)}; {advice} and run again "
        "(nothing half-written was left)",
    )


def write_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors by name, with `metadata` (JSON values) in the header."""
    from safetensors.torch import save_file

    plain = {name: _own(tensor) for name, tensor in tensors.items()}
    header = {METADATA: json.dumps(metadata or {}, sort_keys=True, allow_nan=False)}
    with atomic(path) as hidden:
        save_file(plain, hidden, metadata=header)


def write_tensors_in_turn(path: Path, tensors: Iterable[tuple[str, "Tensor"]]) -> None:
    """Write tensors as they come, so that no two need be in memory together.

    The largest numbers come first in the file, as in `save_file`: all are aligned that way.
    """
    parts: dict[int, BinaryIO] = {}
    headers: dict[int, dict[str, dict[str, Any]]] = {}
    with atomic(path) as hidden, ExitStack() as open_files:
        for name, tensor in tensors:
            plain = tensor.detach().cpu().contiguous()
            size = plain.dtype.itemsize
            if size not in parts:  # a file without a name: gone however this ends
                parts[size] = open_files.enter_context(tempfile.TemporaryFile(dir=path.parent))
                headers[size] = {}
            start = parts[size].tell()
            _write_numbers(parts[size], plain)
            headers[size][name] = {
                "dtype": DTYPES[str(plain.dtype).removeprefix("torch.")],
                "shape": list(plain.shape),
                "data_offsets": [start, parts[size].tell()],
            }
        _join(hidden, [(headers[size], parts[size]) for size in sorted(parts, reverse=True)])


def _write_numbers(file: BinaryIO, tensor: "Tensor") -> None:
    import torch

    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _join(path: Path, parts: Sequence[tuple[Mapping[str, dict[str, Any]], BinaryIO]]) -> None:
    """A header of all parts, then what they hold."""
    header: dict[str, Any] = {"__metadata__": {METADATA: "{}"}}
    start = 0
    for entries, file in parts:
        for name, entry in entries.items():
            header[name] = entry | {"data_offsets": [start + at for at in entry["data_offsets"]]}
        start += file.tell()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as whole:
        whole.write(len(text).to_bytes(8, "little") + text)
        for _, file in parts:
            file.seek(0)
            shutil.copyfileobj(file, whole, CHUNK)


def _own(tensor: "Tensor") -> "Tensor":
    """`tensor` on the CPU, alone in its storage: safetensors refuses views of one storage."""
    plain = tensor.detach().cpu().contiguous()
    return plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, "Tensor"]:
    """The tensors named, or all, in the order of their names; memory-mapped, read when used."""
    with _opened(path) as file:
        known = sorted(file.keys())
        return {name: _tensor(path, file, known, name) for name in names or known}


def read_tensor(path: Path, name: str) -> "Tensor":
    """One tensor; the rest of the file is not read."""
    with _opened(path) as file:
        return _tensor(path, file, sorted(file.keys()), name)


def tensor_names(path: Path) -> list[str]:
    """The names in a file of tensors, sorted."""
    with _opened(path) as file:
        return sorted(file.keys())


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of one tensor; the tensor itself is not read."""
    with _opened(path) as file:
        return tuple(file.get_slice(name).get_shape())


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given as `metadata`."""
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get(METADATA, "{}"))


def _tensor(path: Path, file: Any, known: list[str], name: str) -> "Tensor":
    if name not in known:
        raise ValueError(f"{path} holds no tensor {name!r}; it holds {', '.join(known[:8])}, …")
    return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete file of tensors ({error}); remove it and run again"
        ) from error


def write_table(path: Path, columns: Mapping[str, Any], schema: Mapping[str, str]) -> None:
    """Write a parquet table.

    Args:
        path: where to.
        columns: a sequence of values (list, NumPy array or tensor) by column.
        schema: the type of each column, in the order wanted: `int64`, `float32`, `string`,
            `bool`, …, `list<string>`, `list<list<float>>`. An empty table keeps its types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if list(columns) != list(schema):
        raise ValueError(f"{path}: columns are {list(columns)}, the schema names {list(schema)}")
    arrays = [
        pa.array(_values(columns[name]), type=arrow_type(alias)) for name, alias in schema.items()
    ]
    table = pa.table(arrays, names=list(schema))
    with atomic(path) as hidden:
        pq.write_table(table, hidden, compression="zstd")


def read_table(path: Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """The columns named, or all, of a parquet table; rows by `.to_pylist()`."""
    import pyarrow.parquet as pq

    _check_exists(path)
    return pq.read_table(path, columns=None if columns is None else list(columns))


def _values(column: Any) -> Any:
    return column.detach().cpu().numpy() if hasattr(column, "detach") else column


def arrow_type(alias: str) -> "pa.DataType":
    """The type that a schema calls `int64`, `list<string>`, …"""
    import pyarrow as pa

    nested = re.fullmatch(r"list<(.+)>", alias)
    return pa.list_(arrow_type(nested.group(1))) if nested else pa.type_for_alias(alias)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: indented, keys in the order given, NaN and infinity refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    _check_exists(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno} is not JSON: {error.msg}; correct it or write it again"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, too many digits, too deep
        raise ValueError(f"{path} is not JSON: {error}; correct it or write it again") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `\\n` line ends."""
    with atomic(path) as hidden:
        hidden.write_text(text, encoding="utf-8", newline="\n")


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`: no second copy where hard links work."""
    with atomic(target) as hidden:
        hidden.unlink()
        try:
            os.link(source, hidden)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, hidden)


def digest(path: Path) -> str:
    """sha256 of a file's content; of a folder, that of its files' relative names and digests."""
    if path.is_file():
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                sha.update(chunk)
        return sha.hexdigest()
    _check_exists(path)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{digest(path / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} does not exist; run the stage that writes it")
