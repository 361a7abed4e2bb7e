"""The only door to files that are not on this machine (fsspec): listed, described, and streamed.

A corpus behind a URL is no file that DVC can watch. What can be watched is a description of it:
`activate` writes data/far/<name>.json with the size and the checksum of each file, DVC tracks that
one, and a stage that reads the corpus refuses it where the two disagree.
"""

import hashlib
import io
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from tasks import store

RECORDS = Path("data/far")
BLOCK = 8 << 20  # bytes that a stream asks for at once
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)")
_DATASET = re.compile(r"datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}(/.*)?")
# What file systems call a checksum of the content; failing these, the time of the last change.
_CHECKSUMS = ("etag", "md5", "md5hash", "checksum", "crc32c", "blob_id", "content_md5")
_TIMES = ("lastmodified", "last_modified", "updated", "mtime", "created")


@dataclass(frozen=True, slots=True)
class FarFile:
    """A file behind a URL; it is read as far as it is asked for."""

    url: str
    size: int | None
    checksum: str

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes, of which those are fetched that are read, when they are."""
        system, path = _system(self.url)
        try:  # what fsspec keeps of the bytes before and after, it may fetch twice
            return cast("BinaryIO", system.open(path, mode, cache_type="none"))
        except TypeError:  # a file system whose files keep nothing
            return cast("BinaryIO", system.open(path, mode))

    def stream(self) -> BinaryIO:
        """Its bytes from start to end, `BLOCK` of them at once."""
        return io.BufferedReader(self.open(), BLOCK)  # pyright: ignore[reportArgumentType]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.url).stem

    def __str__(self) -> str:
        return self.url


def is_far(path: object) -> bool:
    """Whether it is a URL, and not a path on this machine."""
    return isinstance(path, str) and _URL.match(path) is not None


def checked(path: str) -> str:
    """The path, if it is one on this machine or a URL that names one thing for good.

    Raises:
        ValueError: a dataset of the hub without a full revision, or a URL that holds a secret.
    """
    found = _URL.fullmatch(path)
    if found is None and "://" not in path:
        return path
    protocol, rest = found.groups() if found else ("", path)
    if protocol in ("", "file", "local") or "::" in path:
        raise ValueError(f"given {path!r}; give the path itself, or a URL without `::`")
    if protocol == "hf" and not _DATASET.fullmatch(rest):
        raise ValueError(
            f"given {path!r}; wanted hf://datasets/organisation/name@<40 hex digits>/…: a name "
            "like main moves, so give the full sha of a commit (see the dataset's history)"
        )
    if "@" in rest.split("/")[0] or "?" in rest:
        raise ValueError(
            "given a URL with a user or a query, which may be a secret and would be written into "
            "artefacts; give credentials as the file system's environment variables"
        )
    return path


def far_files(url: str) -> list[tuple[str, FarFile]]:
    """The files at a URL, sorted, by their names below it; of one file its own name.

    Raises:
        ValueError: nothing is there, it cannot be reached, or a package is missing.
    """
    system, path = _system(url)
    try:
        found = _told(system, path)
    except Exception as error:  # whatever the library of a cloud or of HTTP raises
        raise ValueError(
            f"{url}: cannot be reached ({type(error).__name__}: {error}); correct the URL, or the "
            "environment that its file system takes credentials from"
        ) from error
    if not found:
        raise ValueError(
            f"{url}: no such file or folder, or it cannot be reached; correct corpus.path"
        )
    whole = url.rstrip("/")
    listed = []
    for name, info in sorted(found.items()):
        below = name.strip("/").removeprefix(path.strip("/")).strip("/")
        file = FarFile(f"{whole}/{below}" if below else whole, info.get("size"), _checksum(info))
        listed.append((below or PurePosixPath(name).name, file))
    return listed


def record_of(url: str) -> Path:
    """Where the description of what is at a URL lies, from the project's root."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[-40:].strip("-")
    return RECORDS / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.json"


def describe(url: str) -> dict[str, Any]:
    """URL, and size and checksum of each file."""
    files = {name: {"size": file.size, "checksum": file.checksum} for name, file in far_files(url)}
    return {"url": url, "files": files}


def write_record(root: Path, url: str) -> None:
    """Describe what is at a URL; what is there under a commit's sha never changes."""
    file = root / record_of(url)
    if not (url.startswith("hf://") and file.is_file()):
        found = describe(url)
        if not file.is_file() or store.read_json(file) != found:
            store.write_json(file, found)


def check_record(root: Path, url: str) -> dict[str, Any]:
    """That a URL still holds what its record says; what artefacts say of it.

    Raises:
        ValueError: naming the first file that differs.
    """
    record = root / record_of(url)
    told, found = store.read_json(record)["files"], describe(url)["files"]
    differs = next((n for n in sorted({*told, *found}) if told.get(n) != found.get(n)), None)
    if differs is not None:
        raise ValueError(
            f"{url}: {differs} is {json.dumps(found.get(differs))}, but {record_of(url)} has "
            f"{json.dumps(told.get(differs))}: the corpus changed; run `python -m flows activate "
            "RUN` to take it as it is now"
        )
    return {
        "path": url,
        "record": record_of(url).as_posix(),
        "digest": store.digest(record),
        "num_bytes": sum(file["size"] or 0 for file in found.values()),
    }


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    checked(url)
    protocol = url.split("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install -e '.[{extra}]' -c constraints.txt" if extra else str(error)
        raise ValueError(
            f"{url}: the package for {protocol}:// is missing ({error}); run `{remedy}`"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; a path or a URL of fsspec is wanted") from error


def _told(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """What the file system says of each file at a path, by its name."""
    if PurePosixPath(path).suffix and not path.endswith("/"):
        with suppress(Exception):  # a file that is listed over HTTP is fetched, to look for links
            info = system.info(path)
            if info["type"] == "file":
                return {path: info}
    found = system.find(path, detail=True)
    # Over HTTP a listing is a page of links: some sort the page, and none tells a size.
    return {
        name: info if info.get("size") is not None else system.info(name)
        for name, info in found.items()
        if "?" not in name
    }


def _checksum(info: dict[str, Any]) -> str:
    """What changes with the content; "" where the file system tells nothing."""
    told = {key.lower(): value for key, value in info.items() if value is not None}
    if isinstance(told.get("lfs"), dict):  # of the Hugging Face hub
        told = {"checksum": told["lfs"].get("sha256", "")} | told
    key = next((key for key in (*_CHECKSUMS, *_TIMES) if key in told), None)
    return "" if key is None else f"{key}:{str(told[key]).strip(chr(34))}"
