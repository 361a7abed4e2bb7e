"""Images in the usual formats: MNIST's idx files, CIFAR-10's binary batches, PNG sprites."""

import gzip
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Format = Literal["idx", "cifar10", "sprites"]

_IDX_UBYTE = 0x08  # the type of an idx file: unsigned bytes
_CIFAR = (3, 32, 32)  # channels, height, width


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images as they are stored.

    Args:
        pixels: uint8 [n, channels, height, width].
        labels: int64 [n].
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """Ten, as in every data set of these formats, or more if the labels say so."""
        return max(10, int(self.labels.max(initial=0)) + 1)


def read_images(folder: Path, format: Format, limit: int | None) -> LabelledImages:
    """The training images of a folder, in the order of its files.

    Args:
        folder: where they are.
        format: how they are stored.
        limit: read so many; None reads all.

    Raises:
        ValueError: a file that is missing, broken, or of another format, with the remedy.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; data.images wants the folder of the images, and this "
            "project does not bring every data set with it: put the files there, or name "
            "another folder"
        )
    read = {"idx": _read_idx, "cifar10": _read_cifar10, "sprites": _read_sprites}[format]
    images = read(folder, limit)
    if not len(images.pixels):
        raise ValueError(f"{folder}: the files hold no image")
    return images


def _read_idx(folder: Path, limit: int | None) -> LabelledImages:
    images = _idx_images(folder)
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.is_file():
        raise ValueError(f"{labels}: no such file; the labels of {images.name} are wanted there")
    pixels, classes = _idx_array(images, 3), _idx_array(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(
            f"{labels}: {len(classes)} labels, {images.name} holds {len(pixels)} images; the two "
            "files do not belong together"
        )
    return LabelledImages(pixels[:limit, np.newaxis], classes[:limit].astype(np.int64))


def _idx_images(folder: Path) -> Path:
    """The file of images; that of the training images if there are several."""
    found = sorted(
        path for path in folder.glob("*images*idx3-ubyte*") if path.suffix in ("", ".gz")
    ) + sorted(folder.glob("*images.idx3-ubyte"))
    chosen = [path for path in found if "train" in path.name] or found
    if len(chosen) != 1:
        names = ", ".join(path.name for path in chosen) or "none"
        raise ValueError(
            f"{folder}: one file *images-idx3-ubyte or *images-idx3-ubyte.gz is wanted, or one "
            f"with `train` in its name; there: {names}"
        )
    return chosen[0]


def _idx_array(path: Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Bytes 0, 0, type, dimensions; the sizes, 32 bits each, big-endian; then the numbers."""
    raw = _bytes(path)
    head = 4 + 4 * num_dimensions
    if raw[:4] != bytes([0, 0, _IDX_UBYTE, num_dimensions]) or len(raw) < head:
        raise ValueError(
            f"{path}: not an idx file of bytes in {num_dimensions} dimensions (it begins with "
            f"{raw[:4].hex(' ')}); was it downloaded completely?"
        )
    sizes = np.frombuffer(raw, ">u4", num_dimensions, 4).tolist()
    if len(raw) - head != math.prod(sizes):
        raise ValueError(
            f"{path}: {len(raw) - head} bytes of data, its head speaks of {math.prod(sizes)}; "
            "download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(sizes)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again") from error


def _read_cifar10(folder: Path, limit: int | None) -> LabelledImages:
    files = sorted(folder.glob("data_batch_*.bin"))
    if not files and list(folder.glob("data_batch_*")):
        raise ValueError(
            f"{folder}: these are the batches for Python, which are pickles, and reading a pickle "
            "can run code; take the binary version (cifar-10-binary.tar.gz: data_batch_1.bin, …)"
        )
    if not files:
        raise ValueError(f"{folder}: no data_batch_*.bin; CIFAR-10's binary version is wanted")
    size, parts, num = 1 + math.prod(_CIFAR), [], 0
    for file in files:
        raw = np.frombuffer(_bytes(file), np.uint8)
        if len(raw) % size:
            raise ValueError(
                f"{file}: {len(raw)} bytes are no multiple of {size}, one label and 3 × 32 × 32 "
                "pixels; download it again"
            )
        parts.append(raw.reshape(-1, size))
        num += len(parts[-1])
        if limit is not None and num >= limit:
            break
    rows = np.concatenate(parts)[:limit]
    return LabelledImages(rows[:, 1:].reshape(-1, *_CIFAR), rows[:, 0].astype(np.int64))


def _read_sprites(folder: Path, limit: int | None) -> LabelledImages:
    """A row of a PNG is an image, its pixels row by row."""
    files = sorted(folder.glob("train_batch_*.png"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise ValueError(f"{folder}: no train_batch_*.png; a row of each is one image")
    labels = _sprite_labels(folder / "labels.json")
    parts, num = [], 0
    for file in files:
        parts.append(_sprite(file))
        num += len(parts[-1])
        if limit is not None and num >= limit:
            break
    pixels = np.concatenate(parts)[:limit]
    if len(labels) < len(pixels):
        raise ValueError(
            f"{folder / 'labels.json'}: {len(labels)} labels for {len(pixels)} images; a label "
            "for each row of the PNG files is wanted"
        )
    return LabelledImages(pixels, labels[: len(pixels)])


def _sprite(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            mode, sprite = image.mode, np.asarray(image)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a PNG ({error})") from error
    side = math.isqrt(sprite.shape[1])
    if mode not in ("L", "RGB") or side * side != sprite.shape[1]:
        raise ValueError(
            f"{path}: {sprite.shape[1]} pixels wide in mode {mode}; a row of a square image in "
            "grey or RGB, 8 bits a channel, is wanted"
        )
    channels = 1 if mode == "L" else 3
    return np.moveaxis(sprite.reshape(len(sprite), side, side, channels), 3, 1)


def _sprite_labels(path: Path) -> NDArray[np.int64]:
    try:
        labels = json.loads(path.read_text("utf-8"))["train"]
        return np.array([int(label) for label in labels], dtype=np.int64)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path}: cannot be read ({error}); {{"train": [6, 9, …]}} is wanted, a class for '
            "each row of the PNG files"
        ) from error
