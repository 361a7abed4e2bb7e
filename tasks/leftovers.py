"""What no stage will use again: partial results, what Prefect remembers of them, lost checkouts."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import dvcstage
from tasks.params import load_params
from tasks.validation.settings import is_benchmark, load_benchmark
from tasks.workspace import ARTIFACTS, EXPERIMENTS, STAGES, WORK

FOLDER = re.compile(rf"(?P<run>.+)-(?P<stage>{'|'.join(STAGES)})-(?P<fingerprint>[0-9a-f]{{12}})")
RESULTS = Path(".prefect/storage")
CACHE = Path(".dvc/cache/files/md5")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder, or some files of it, to remove, their size, and why nothing will use them.

    Attributes:
        path: of the folder.
        num_bytes: how much it takes up.
        reason: why nothing needs it.
        files: those to remove; None: the whole folder.
    """

    path: Path
    num_bytes: int
    reason: str
    files: tuple[Path, ...] | None = None

    def remove(self) -> None:
        """Delete it."""
        if self.files is None:
            shutil.rmtree(self.path)
        for file in self.files or ():
            file.unlink(missing_ok=True)


def leftovers(root: Path) -> list[Leftover]:
    """All that can go without anything being computed again.

    While nothing is at work in the checkout: a stage at work is not told from one that was killed.
    """
    abandoned = list(_abandoned_work(root))
    gone = {leftover.path for leftover in abandoned}
    kept = [folder for folder in _folders(root / WORK) if folder not in gone]
    return [*abandoned, *_old_results(root, kept), *_lost_checkouts(root)]


def _abandoned_work(root: Path) -> Iterator[Leftover]:
    """Folders of partial results whose inputs have changed since, or whose run is gone."""
    for folder in _folders(root / WORK):
        if reason := _why_abandoned(root, folder.name):
            yield Leftover(folder, size_of(_files(folder)), reason)


def _why_abandoned(root: Path, name: str) -> str | None:
    """None if the stage would resume there."""
    match = FOLDER.fullmatch(name)
    if match is None:
        return "no stage's folder"
    run, stage = match["run"], match["stage"]
    try:
        params = load_benchmark(root, run) if is_benchmark(root, run) else load_params(root, run)
        current = dvcstage.input_fingerprint(root, stage, run, params.runtime)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None if current.startswith(match["fingerprint"]) else "its inputs have changed"


def _old_results(root: Path, kept: list[Path]) -> Iterator[Leftover]:
    """What Prefect remembers of shards whose files are gone: no stage will take them up."""
    names = {file.name for folder in kept for file in folder.iterdir()}
    old = tuple(file for file in _files(root / RESULTS) if not _may_be_used(file, names))
    if old:
        yield Leftover(root / RESULTS, size_of(old), "results of shards whose files are gone", old)


def _may_be_used(result: Path, names: set[str]) -> bool:
    """Whether a stored result of Prefect is no shard's, or that of one of the files `names`.

    A name that several stages use saves the results of all: which is whose, only their keys say.
    """
    try:
        told = json.loads(json.loads(result.read_text(encoding="utf-8"))["result"])
    except (ValueError, TypeError, KeyError):
        return True
    if not isinstance(told, dict):
        return True
    if set(told) == {"file", "digest"}:
        return told["file"] in names
    return "__exc_type__" not in told  # how a shard failed


def _lost_checkouts(root: Path) -> Iterator[Leftover]:
    """Temporary checkouts of experiments; DVC removes them unless it is killed."""
    for parent in (root / EXPERIMENTS, root / EXPERIMENTS / "standalone"):
        for folder in _folders(parent):
            if folder.name.startswith("tmp"):
                yield Leftover(folder, size_of(_files(folder)), "an experiment that was killed")


def damaged_cache(root: Path, artifact: Path = ARTIFACTS) -> list[Leftover]:
    """Files of an artefact that are not what DVC's cache calls them.

    An artefact and the cache share one file on disk. Its mode forbids writing, but not to root: who
    edits it in place edits the cache, and DVC, which trusts that mode, restores it ever after, also
    in place of what a stage has just computed anew. Once the file is gone DVC notices.
    """
    inodes = {file.stat().st_ino for file in _files(root / artifact)}
    files = [file for file in (root / CACHE).glob("??/*") if file.stat().st_ino in inodes]
    damaged = tuple(file for file in files if _md5(file) != file.parent.name + file.name)
    reason = "damaged: their artefacts were edited in place"
    return [Leftover(root / CACHE, size_of(damaged), reason, damaged)] if damaged else []


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(files: Iterable[Path]) -> int:
    """Bytes that are free once the files are: what another name keeps is not."""
    stats = (file.lstat() for file in files)
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
