"""A benchmark's data: the split, the scale, each format, and what is said of bad files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence.examples import ExampleBatch
from influence.likelihoods import Gaussian, Softmax
from influence.sequences import TokenBatch
from tasks.validation.datasets import Splits, load_data, random_generator, split_places
from tasks.validation.settings import Digits, Images, Story, Table

RANDOM = np.random.default_rng(0)


def parts(splits: Splits) -> list[ExampleBatch]:
    found = [splits.train, splits.validation, splits.test]
    assert all(isinstance(part, ExampleBatch) for part in found)
    return found  # pyright: ignore[reportReturnType]


def write_table(path: Path, rows: np.ndarray) -> Path:
    with gzip.open(path, "wt") as stream:
        np.savetxt(stream, rows, delimiter=",")
    return path


def load_table(path: Path, limit: int | None = None, seed: int = 0) -> Splits:
    return load_data(Table(table=path.name, limit=limit), path.parent, seed, torch.float64)


# --- split and scale -----------------------------------------------------------------------------


def test_a_split_is_70_20_10_and_depends_on_the_seed_alone():
    first, again, other = (split_places(1030, seed, "x") for seed in (0, 0, 1))
    assert [len(places) for places in first] == [721, 206, 103]
    assert torch.cat(first).sort().values.equal(torch.arange(1030))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


def test_generators_of_two_purposes_differ_and_the_global_one_is_left_alone():
    before = torch.random.get_rng_state()
    draws = [torch.rand(1, generator=random_generator(0, purpose)) for purpose in ("a", "b", "a")]
    assert draws[0] == draws[2] != draws[1]
    assert torch.random.get_rng_state().equal(before)


def test_columns_of_a_table_are_standardised_by_the_training_part(tmp_path):
    rows = RANDOM.normal(size=(100, 4)) * [1, 10, 0, 3] + [5, 0, 0.1, 7]
    splits = load_table(write_table(tmp_path / "a.csv.gz", rows))
    train, _, test = parts(splits)
    values = torch.cat([train.inputs, train.targets], dim=1)
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(4).double(), atol=1e-12, rtol=0)
    # The third column is constant: it has no scale, and rounding must not give it one.
    torch.testing.assert_close(values.std(dim=0, correction=0), torch.tensor([1, 1, 0, 1]).double())
    raw = torch.from_numpy(rows)
    mean, std = raw[train.ids].mean(dim=0), raw[train.ids].std(dim=0, correction=0)
    expected = ((raw[test.ids] - mean) / std)[:, [0, 1]]
    torch.testing.assert_close(test.inputs[:, :2], expected)
    assert isinstance(train.likelihood, Gaussian)
    assert (splits.num_outputs, splits.context) == (1, None)


def test_ids_are_rows_of_the_file_whatever_the_seed(tmp_path):
    rows = np.stack([np.arange(50), 2.0 * np.arange(50)], axis=1)
    path = write_table(tmp_path / "a.csv.gz", rows)
    for seed in (0, 1):
        train, *_ = parts(load_table(path, seed=seed))
        raw = train.ids.double()
        scaled = (raw - raw.mean()) / raw.std(correction=0)
        torch.testing.assert_close(train.inputs[:, 0], scaled)


def test_limit_reads_the_first_rows_of_a_plain_file_too(tmp_path):
    np.savetxt(tmp_path / "a.csv", RANDOM.normal(size=(50, 3)), delimiter=",")
    ids = torch.cat([part.ids for part in parts(load_table(tmp_path / "a.csv", limit=20))])
    assert ids.sort().values.equal(torch.arange(20))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("a,b\n1,2\n", "without a header"),
        ("1,2\n1,2,3\n", "as many in each row"),
        ("1,2\n1,nan\n", "every number finite"),
        ("1\n2\n", "at least one feature"),
        ("1,2\n" * 4, "too few"),
    ],
)
def test_a_bad_table_is_told(tmp_path, text: str | None, told: str):
    if text is not None:
        (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        load_table(tmp_path / "a.csv")
    assert "a.csv" in str(caught.value)


def test_a_broken_gz_file_is_told(tmp_path):
    path = write_table(tmp_path / "a.csv.gz", RANDOM.normal(size=(50, 3)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.csv\.gz: cannot be read"):
        load_table(path)


# --- images --------------------------------------------------------------------------------------


def load_images(folder: Path, format: str, limit: int | None = None) -> Splits:
    data = Images.model_validate({"images": folder.name, "format": format, "limit": limit})
    return load_data(data, folder.parent, 0, torch.float64)


def in_order(splits: Splits) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and classes of all parts, as they were read."""
    ids = torch.cat([part.ids for part in parts(splits)])
    order = ids.argsort()
    inputs = torch.cat([part.inputs for part in parts(splits)])[order]
    return inputs, torch.cat([part.targets for part in parts(splits)])[order]


def is_these(splits: Splits, pixels: np.ndarray, labels: np.ndarray) -> bool:
    """The images are these up to a scale for each channel, with these labels."""
    inputs, classes = in_order(splits)
    assert classes.tolist() == labels.tolist()
    assert inputs.shape == pixels.shape
    raw = torch.from_numpy(pixels).double() / 255
    for channel in range(pixels.shape[1]):
        train = raw[splits.train.ids, channel]
        scaled = (raw[:, channel] - train.mean()) / train.std(correction=0)
        torch.testing.assert_close(inputs[:, channel], scaled)
    return True


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def random_images(num: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = RANDOM.integers(0, 256, size=(num, *shape), dtype=np.uint8)
    return pixels, RANDOM.integers(0, 10, size=num)


def write_idx(folder: Path, begin: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{begin}images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels[:, 0])))
    (folder / f"{begin}labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_idx_files_are_read_and_the_training_images_preferred(tmp_path):
    pixels, labels = random_images(30, 1, 4, 5)
    write_idx(tmp_path / "a", "train-", pixels, labels)
    write_idx(tmp_path / "a", "t10k-", *random_images(20, 1, 4, 5))
    assert is_these(load_images(tmp_path / "a", "idx"), pixels, labels)
    assert is_these(load_images(tmp_path / "a", "idx", 20), pixels[:20], labels[:20])


def test_idx_files_need_no_compression_and_no_prefix(tmp_path):
    pixels, labels = random_images(30, 1, 4, 4)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/images-idx3-ubyte").write_bytes(idx(pixels[:, 0]))
    (tmp_path / "a/labels-idx1-ubyte").write_bytes(idx(labels))
    assert is_these(load_images(tmp_path / "a", "idx"), pixels, labels)


def test_bad_idx_files_are_told(tmp_path):
    folder, (pixels, labels) = tmp_path / "a", random_images(30, 1, 4, 4)
    with pytest.raises(ValueError, match="no such folder"):
        load_images(folder, "idx")
    folder.mkdir()
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz is wanted.*there: none"):
        load_images(folder, "idx")
    write_idx(folder, "", pixels, labels[:20])
    with pytest.raises(ValueError, match=r"20 labels, .* holds 30 images"):
        load_images(folder, "idx")
    images = folder / "images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(idx(pixels[:, 0])[:-1]))
    with pytest.raises(ValueError, match="479 bytes of data, its head speaks of 480"):
        load_images(folder, "idx")
    images.write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match="not an idx file"):
        load_images(folder, "idx")
    images.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="cannot be read"):
        load_images(folder, "idx")
    (folder / "labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz: no such file"):
        load_images(folder, "idx")
    write_idx(folder, "other-", pixels, labels)
    with pytest.raises(ValueError, match="with `train` in its name"):
        load_images(folder, "idx")


def test_cifars_binary_batches_are_read_in_order(tmp_path):
    pixels, labels = random_images(30, 3, 32, 32)
    rows = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(30, -1)], axis=1)
    for number in (1, 2):
        half = rows[15 * (number - 1) : 15 * number]
        (tmp_path / f"data_batch_{number}.bin").write_bytes(half.tobytes())
    assert is_these(load_images(tmp_path, "cifar10"), pixels, labels)
    assert is_these(load_images(tmp_path, "cifar10", 12), pixels[:12], labels[:12])
    (tmp_path / "data_batch_2.bin").write_bytes(rows.tobytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: .* no multiple of 3073"):
        load_images(tmp_path, "cifar10")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"pickles.*can run code; take the binary version"):
        load_images(tmp_path, "cifar10")
    (tmp_path / "data_batch_1").unlink()
    with pytest.raises(ValueError, match=r"no data_batch_\*\.bin"):
        load_images(tmp_path, "cifar10")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_a_sprite_is_an_image(tmp_path, channels: int):
    pixels, labels = random_images(36, channels, 4, 4)
    rows = np.moveaxis(pixels, 1, 3).reshape(36, 16, channels)
    rows = rows[..., 0] if channels == 1 else rows
    # Ten comes after nine, not after one.
    for number in range(12):
        Image.fromarray(rows[3 * number : 3 * number + 3]).save(
            tmp_path / f"train_batch_{number}.png"
        )
    (tmp_path / "labels.json").write_text(json.dumps({"train": labels.tolist(), "test": [1]}))
    assert is_these(load_images(tmp_path, "sprites"), pixels, labels)
    assert is_these(load_images(tmp_path, "sprites", 20), pixels[:20], labels[:20])


def test_bad_sprites_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"no train_batch_\*\.png"):
        load_images(tmp_path, "sprites")
    file = tmp_path / "train_batch_0.png"
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"labels\.json: cannot be read"):
        load_images(tmp_path, "sprites")
    (tmp_path / "labels.json").write_text('{"train": [1, 2]}')
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        load_images(tmp_path, "sprites")
    Image.fromarray(np.zeros((20, 15), np.uint8)).save(file)
    with pytest.raises(ValueError, match="15 pixels wide in mode L"):
        load_images(tmp_path, "sprites")
    Image.fromarray(np.zeros((20, 16), np.uint8)).save(file)
    with pytest.raises(ValueError, match="2 labels for 20 images"):
        load_images(tmp_path, "sprites")


def test_digits_are_images_of_8_by_8(tmp_path):
    splits = load_data(Digits(digits="sklearn", limit=None), tmp_path, 0, torch.float32)
    train, *_ = parts(splits)
    assert train.inputs.shape == (1257, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert abs(float(train.inputs.mean())) < 1e-5
    assert abs(float(train.inputs.std()) - 1) < 1e-4
    assert isinstance(train.likelihood, Softmax)
    assert splits.num_outputs == 10
    _, classes = in_order(splits)
    assert classes[:12].tolist() == [*range(10), 0, 1]


# --- text ----------------------------------------------------------------------------------------


def stories(folder: Path, num: int = 40) -> Path:
    lines = [{"text": f"The {w} sat on the mat. " * 3} for w in ("cat", "dog", "hen", "pig")]
    path = folder / "a.jsonl.gz"
    text = "".join(json.dumps(lines[n % 4]) + "\n" for n in range(num))
    path.write_bytes(gzip.compress(text.encode()))
    return path


def load_story(path: Path, limit: int = 20, context: int = 8) -> Splits:
    data = Story(text=path.name, vocabulary=270, context=context, limit=limit)
    return load_data(data, path.parent, 0, torch.float64)


def test_text_is_windows_of_which_queries_are_second_halves(tmp_path):
    splits = load_story(stories(tmp_path))
    assert isinstance(splits.train, TokenBatch)
    assert isinstance(splits.test, TokenBatch)
    assert [len(p.ids) for p in (splits.train, splits.validation, splits.test)] == [14, 4, 2]
    assert (splits.context, splits.num_outputs) == (8, 270)
    assert splits.train.supervised[0].tolist() == [False, *[True] * 7]
    assert splits.test.supervised[0].tolist() == [False] * 4 + [True] * 4
    ids = torch.cat([splits.train.ids, splits.validation.ids, splits.test.ids])
    assert ids.sort().values.equal(torch.arange(20))


def test_text_is_the_same_on_every_call(tmp_path):
    path = stories(tmp_path)
    first, again = load_story(path), load_story(path)
    assert isinstance(first.train, TokenBatch)
    assert isinstance(again.train, TokenBatch)
    assert first.train.tokens.equal(again.train.tokens)


def test_text_that_is_too_short_or_absent_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: .* wants 9999: lower it"):
        load_story(stories(tmp_path), limit=9999)
    with pytest.raises(ValueError, match="no such file"):
        load_story(tmp_path / "b.jsonl")
