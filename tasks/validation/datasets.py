"""The data of a benchmark: read, split 70/20/10 at random, standardised by the training part."""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from influence.examples import Batch, ExampleBatch
from influence.likelihoods import Gaussian, Softmax
from influence.sequences import TokenBatch
from tasks.corpora import Corpus, documents
from tasks.scratch import train_tokenizer
from tasks.validation.images import read_images
from tasks.validation.settings import Data, Digits, Images, Story, Table
from tasks.windows import cut_windows, encode

PARTS = (7, 2)  # tenths that train and validate; the rest is for testing (Grosse et al. 2023, C)


@dataclass(frozen=True, slots=True)
class Splits:
    """A benchmark's examples; ids are places in the data as read, so they differ between parts.

    Args:
        train: what the model is trained on.
        validation: what rate and weight decay are chosen by.
        test: where queries are drawn from; of text, only the second half is supervised, so that
            f = log p(second half | first half).
        num_outputs: classes, numbers of a target, or tokens of the vocabulary.
    """

    train: Batch
    validation: Batch
    test: Batch
    num_outputs: int

    @property
    def context(self) -> int | None:
        """Tokens of a sequence; None if the examples are none."""
        return self.train.tokens.shape[1] if isinstance(self.train, TokenBatch) else None


def load_data(data: Data, root: Path, seed: int, dtype: torch.dtype) -> Splits:
    """The examples that a benchmark's params speak of.

    Args:
        data: which; paths are relative to `root`.
        root: the project's folder.
        seed: of the split.
        dtype: of inputs and regression targets.

    Raises:
        ValueError: a file that is missing or is not what the params say, with the remedy.
    """
    if isinstance(data, Story):
        return _story(data, root, seed)
    if isinstance(data, Table):
        table = torch.from_numpy(_read_table(root / data.table, data.limit))
        splits = split_places(len(table), seed, data.table)
        scaled = standardise(table, splits[0], per=table.shape[1:]).to(dtype)
        inputs, targets, likelihood = scaled[:, :-1], scaled[:, -1:], Gaussian()
        num_outputs = 1
    else:
        pixels, targets, num_outputs, name = _labelled(data, root, dtype)
        splits = split_places(len(pixels), seed, name)
        # Channels are scaled as a whole: a pixel that is nearly always black has no scale.
        inputs = standardise(pixels, splits[0], per=pixels.shape[1:2])
        likelihood = Softmax()
    examples = ExampleBatch(torch.arange(len(inputs)), inputs, targets, likelihood)
    train, validation, test = (examples.select(places) for places in splits)
    return Splits(train, validation, test, num_outputs)


def random_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose: those of two purposes have nothing to do with each other."""
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def split_places(num: int, seed: int, name: str) -> list[Int[Tensor, " _"]]:
    """Places for training, validation and test, each sorted.

    Raises:
        ValueError: if one of the three would be empty.
    """
    sizes = [num * part // 10 for part in PARTS]
    sizes.append(num - sum(sizes))
    if min(sizes) < 1:
        raise ValueError(
            f"{name}: {num} examples are too few to split into training, validation and test; "
            "10 are enough: raise the limit, or give more data"
        )
    order = torch.randperm(num, generator=random_generator(seed, "split"))
    return [places.sort().values for places in order.split(sizes)]


def standardise(
    values: Float[Tensor, "n ..."], train: Int[Tensor, " _"], per: torch.Size
) -> Float[Tensor, "n ..."]:
    """Zero mean and unit variance over the training examples.

    Args:
        values: of all examples.
        train: places of the training examples.
        per: the leading sizes of an example that have a scale each, such as its columns or
            channels; what comes after shares one. Constant values become 0.
    """
    kept = values[train].reshape(len(train), *per, -1)
    mean, std = kept.mean(dim=(0, -1)), kept.std(dim=(0, -1), correction=0)
    # The mean of equal numbers may differ from them by rounding, and their deviation from 0.
    constant = std <= 1e-12 * kept.abs().amax(dim=(0, -1))
    shape = (*per, *(1 for _ in values.shape[1 + len(per) :]))
    scale = torch.where(constant, torch.ones_like(std), std).reshape(shape)
    scaled = (values - mean.reshape(shape)) / scale
    return torch.where(constant.reshape(shape), torch.zeros_like(scaled), scaled)


def _labelled(
    data: Digits | Images, root: Path, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, str]:
    """Pixels in [0, 1], [n, channels, height, width], classes, their number, and a name."""
    if isinstance(data, Images):
        images = read_images(root / data.images, data.format, data.limit)
        pixels = torch.tensor(images.pixels, dtype=dtype) / 255
        return pixels, torch.from_numpy(images.labels), images.num_classes, data.images
    digits = cast(Any, load_digits())
    pixels = torch.from_numpy(digits.images[: data.limit]).to(dtype).unsqueeze(1) / 16
    classes = torch.from_numpy(digits.target[: data.limit]).long()
    return pixels, classes, 10, "scikit-learn's digits"


def _read_table(path: Path, limit: int | None) -> np.ndarray:
    """Rows of numbers, float64."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; data.table wants a .csv or .csv.gz file")
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as stream:
            table = np.loadtxt(stream, delimiter=",", ndmin=2, max_rows=limit)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read as rows of numbers ({error}); data.table wants numbers "
            "between commas, as many in each row, without a header"
        ) from error
    if table.shape[1] < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"{path}: {table.shape[1]} columns, {int((~np.isfinite(table)).sum())} numbers that "
            "are not finite; data.table wants at least one feature and, last, the target, and "
            "every number finite: leave such rows out"
        )
    return table


def _story(data: Story, root: Path, seed: int) -> Splits:
    """Windows of text, end to end: neighbours come from one story, and may be parted."""
    read = list(documents(Corpus(root / data.text)))
    tokenizer = train_tokenizer((document.text for document in read), data.vocabulary)
    encoded = encode(tokenizer, read, bos=False, eos=True)
    windows = cut_windows([document.id for document in read], encoded, "pack", data.context)
    whole = len(windows.tokens) // data.context
    if whole < data.limit:
        raise ValueError(
            f"{data.text}: {whole} sequences of {data.context} tokens, data.limit wants "
            f"{data.limit}: lower it, or give more text"
        )
    tokens = torch.from_numpy(windows.tokens[: data.limit * data.context]).long()
    tokens = tokens.unflatten(0, (data.limit, data.context))
    parts = split_places(data.limit, seed, data.text)
    first = [1, 1, data.context // 2]
    train, validation, test = (
        TokenBatch(places, tokens[places], _supervised(tokens[places], begin))
        for places, begin in zip(parts, first, strict=True)
    )
    return Splits(train, validation, test, len(tokenizer))


def _supervised(tokens: Int[Tensor, "n t"], begin: int) -> Bool[Tensor, "n t"]:
    """Every token from place `begin` on."""
    supervised = torch.ones_like(tokens, dtype=torch.bool)
    supervised[:, :begin] = False
    return supervised
