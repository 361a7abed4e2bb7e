"""Where a run's checkpoint lies and what it holds: model.json, and the door to the hub."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub

from tasks import store

ADAPTER = "adapter/"  # before the names of an adapter's files
Source = Literal["checkpoint", "hub", "scratch", "finetuned"]

# What a checkpoint consists of: configuration, weights, tokenizer. Pictures, licences and
# weights in other formats are neither fetched nor counted in its digest.
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A checkpoint on this machine, as model.json records it.

    Args:
        source: where it came from.
        path: as recorded: relative to the project (checkpoint), to the stage's folder (scratch,
            finetuned), or a hub id (hub). None of them depends on the machine.
        revision: the hub's commit; None elsewhere.
        folder: where its files lie on this machine.
        files: file name and sha256, sorted.
        num_parameters: all parameters, tied ones once.
        vocabulary: size of the embedding: token ids must lie below it.
        context: the longest sequence the model reads; None where it has no limit.
        adapter: where a LoRA adapter of this checkpoint is, relative to the project; its files are
            among `files` as `adapter/<name>`. None: the checkpoint alone.
        adapter_folder: the same on this machine.
    """

    source: Source
    path: str
    revision: str | None
    folder: Path
    files: tuple[tuple[str, str], ...]
    num_parameters: int
    vocabulary: int
    context: int | None
    adapter: str | None = None
    adapter_folder: Path | None = None

    @property
    def name(self) -> str:
        """As people know it: where it came from, with its adapter."""
        return self.path if self.adapter is None else f"{self.adapter} on {self.path}"

    @property
    def digest(self) -> str:
        """sha256 over the names and digests of all files."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def write_reference(reference: ModelReference, file: Path) -> None:
    """Write model.json; the folder on this machine is left out of it."""
    store.write_json(
        file,
        {
            "source": reference.source,
            "path": reference.path,
            "revision": reference.revision,
            "files": dict(reference.files),
            "digest": reference.digest,
            "parameters": reference.num_parameters,
            "vocabulary": reference.vocabulary,
            "context": reference.context,
            **({} if reference.adapter is None else {"adapter": reference.adapter}),
        },
    )


def read_reference(train: Path, root: Path) -> ModelReference:
    """The model of a run, from the folder of its `train` stage.

    Args:
        train: artifacts/<run>/train.
        root: the project's root, which given checkpoints are relative to.

    Raises:
        ValueError: a file of the checkpoint is not where model.json says.
    """
    written = store.read_json(train / "model.json")
    source, path, revision = written["source"], written["path"], written["revision"]
    folder = (
        hub_snapshot(path, revision)
        if source == "hub"
        else (train if source in ("scratch", "finetuned") else root) / path
    )
    adapter = root / written["adapter"] if "adapter" in written else None
    missing = [name for name in written["files"] if not _place(folder, adapter, name).is_file()]
    if missing:
        raise ValueError(
            f"{adapter or folder}: the checkpoint's {', '.join(missing)} is not there; "
            "bring it back or run the stage `train` again"
        )
    return ModelReference(
        source=source,
        path=path,
        revision=revision,
        folder=folder,
        files=tuple(sorted(written["files"].items())),
        num_parameters=written["parameters"],
        vocabulary=written["vocabulary"],
        context=written["context"],
        adapter=written.get("adapter"),
        adapter_folder=adapter,
    )


def _place(folder: Path, adapter: Path | None, name: str) -> Path:
    if adapter is not None and name.startswith(ADAPTER):
        return adapter / name.removeprefix(ADAPTER)
    return folder / name


def hub_snapshot(name: str, revision: str | None) -> Path:
    """The folder of a checkpoint of the Hugging Face hub, fetched if it is not in the local cache.

    Raises:
        ValueError: it is not in the cache and cannot be fetched.
    """
    try:
        return cached_snapshot(name, revision)
    except ValueError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, **_wanted(revision)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"train.checkpoint.hub: {name!r} at revision {revision!r} is neither in the local "
            f"cache nor to be had from the hub ({type(error).__name__}: {error}); check name, "
            "revision and network, or give a local folder as train.checkpoint.path"
        ) from error


def cached_snapshot(name: str, revision: str | None) -> Path:
    """The same, if it is in the local cache.

    Raises:
        ValueError: it is not.
    """
    try:
        wanted = _wanted(revision)
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} at revision {revision!r} is not in the local cache of the hub; stage "
            "`train` fetches it"
        ) from error


def _wanted(revision: str | None) -> dict[str, Any]:
    # "*/*": copies in other formats usually lie in sub-folders.
    return {
        "revision": revision,
        "allow_patterns": [f"*{suffix}" for suffix in _SUFFIXES],
        "ignore_patterns": ["*/*"],
    }


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that its digest covers, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _SUFFIXES)
