"""Files appear whole or not at all, with the same bytes for the same content."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tasks import store

TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.ones(3, 2, dtype=torch.float64)}
COLUMNS = {"row": [1, 2], "name": ["x", "ü"], "spans": [[[0.5]], []]}
SCHEMA = {"row": "int64", "name": "string", "spans": "list<list<float>>"}

WRITERS: dict[str, Callable[[Path], None]] = {
    "tensors": lambda path: store.write_tensors(path, TENSORS, {"unit": "nats", "n": 3, "k": [1]}),
    "table": lambda path: store.write_table(path, COLUMNS, SCHEMA),
    "json": lambda path: store.write_json(path, {"z": 1, "a": "ü"}),
    "text": lambda path: store.write_text(path, "two\nlines\n"),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def test_tensors_come_back_with_their_metadata(tmp_path):
    WRITERS["tensors"](tmp_path / "x")
    assert store.tensor_names(tmp_path / "x") == ["a", "b"]
    assert store.read_metadata(tmp_path / "x") == {"unit": "nats", "n": 3, "k": [1]}
    for name, tensor in store.read_tensors(tmp_path / "x").items():
        torch.testing.assert_close(tensor, TENSORS[name], rtol=0, atol=0)
        torch.testing.assert_close(store.read_tensor(tmp_path / "x", name), tensor)
    assert list(store.read_tensors(tmp_path / "x", ["b"])) == ["b"]


def test_views_of_one_storage_and_transposes_can_be_written(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    store.write_tensors(
        tmp_path / "x", {"row": base[1], "whole": base, "mT": base.mT, "0d": base.sum()}
    )
    read = store.read_tensors(tmp_path / "x")
    torch.testing.assert_close(read["row"], base[1])
    torch.testing.assert_close(read["mT"], base.mT)
    assert read["0d"].shape == ()


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    WRITERS["tensors"](tmp_path / "x")
    with pytest.raises(ValueError, match="no tensor 'c'; it holds a, b"):
        store.read_tensor(tmp_path / "x", "c")


def test_a_table_comes_back_and_an_empty_one_keeps_its_types(tmp_path):
    WRITERS["table"](tmp_path / "x")
    assert store.read_table(tmp_path / "x").to_pydict() == COLUMNS
    assert store.read_table(tmp_path / "x", ["name"]).column_names == ["name"]
    store.write_table(tmp_path / "y", {name: [] for name in SCHEMA}, SCHEMA)
    assert store.read_table(tmp_path / "y").schema == store.read_table(tmp_path / "x").schema


def test_a_table_takes_tensors_and_refuses_columns_without_a_type(tmp_path):
    store.write_table(tmp_path / "x", {"n": torch.arange(3)}, {"n": "int32"})
    assert store.read_table(tmp_path / "x")["n"].to_pylist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"columns are \['n'\], the schema names \['m'\]"):
        store.write_table(tmp_path / "x", {"n": [1]}, {"m": "int32"})


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path):
    WRITERS["json"](tmp_path / "x")
    assert list(store.read_json(tmp_path / "x")) == ["z", "a"]
    with pytest.raises(ValueError, match=r"Out of range|not JSON compliant"):
        store.write_json(tmp_path / "y", {"loss": float("nan")})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@writers
def test_the_same_content_gives_the_same_bytes(tmp_path, write):
    write(tmp_path / "x")
    write(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_bytes_of_tensors_do_not_depend_on_the_process(tmp_path):
    code = "import sys; from pathlib import Path; from tests.test_store import WRITERS; "
    code += "WRITERS['tensors'](Path(sys.argv[1]))"
    root = Path(__file__).parents[1]
    for name in ("x", "y"):
        environment = os.environ | {"PYTHONHASHSEED": "1" if name == "x" else "2"}
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / name], cwd=root, env=environment, check=True
        )
    assert store.digest(tmp_path / "x") == store.digest(tmp_path / "y")


@writers
def test_the_mode_of_a_file_is_what_the_umask_asks_for(tmp_path, write):
    old = os.umask(0o027)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@writers
def test_a_full_disk_is_named_and_leaves_the_old_file_and_no_other(tmp_path, write):
    (tmp_path / "x").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(store.StorageError) as raised:
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert raised.value.errno == errno.EFBIG
    assert str(raised.value).startswith(f"cannot write {tmp_path / 'x'}: File too large; ")
    assert (tmp_path / "x").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@writers
def test_a_disk_without_space_is_named(tmp_path, write):
    """On a file system of one page, which only root may make."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "none", tmp_path],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        (tmp_path / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(store.StorageError, match=r"No space left .*free some space") as raised:
            write(tmp_path / "x")
        assert raised.value.errno == errno.ENOSPC
        assert [file.name for file in tmp_path.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@writers
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(store.StorageError, match=f"cannot write {tmp_path}/file/x: "):
        write(tmp_path / "file" / "x")


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def write_half() -> None:
        with store.atomic(tmp_path / "x") as hidden:
            hidden.write_text("half")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_of_tensors_is_refused(tmp_path):
    WRITERS["tensors"](tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"not a complete file of tensors .* remove it"):
        store.read_tensors(tmp_path / "x")


def test_what_does_not_exist_is_named(tmp_path):
    for read in (store.read_tensors, store.read_table, store.read_json, store.digest):
        with pytest.raises(ValueError, match="nowhere does not exist"):
            read(tmp_path / "nowhere")


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "x").write_text('{\n"a": }')
    with pytest.raises(ValueError, match="x:2 is not JSON"):
        store.read_json(tmp_path / "x")


def test_a_link_is_no_second_copy(tmp_path):
    WRITERS["json"](tmp_path / "x")
    store.link(tmp_path / "x", tmp_path / "deep" / "y")
    assert (tmp_path / "x").samefile(tmp_path / "deep" / "y")


def test_the_digest_of_a_folder_tells_content_and_names(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            store.write_text(tmp_path / name / file, text)
        return store.digest(tmp_path / name)

    one = folder("1", {"a": "x", "b/c": "y"})
    assert folder("2", {"b/c": "y", "a": "x"}) == one
    assert folder("3", {"a": "x", "b/c": "z"}) != one
    assert folder("4", {"a": "x", "c": "y"}) != one


def test_tensors_written_in_turn_are_read_as_any_others(tmp_path):
    """Of all sizes of numbers, mixed, so that none would be aligned by chance."""
    wanted = {
        "odd": torch.randn(3, 5),
        "count": torch.tensor(7),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(3).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 3).mT,
        "none": torch.zeros(0, 4),
        "more": torch.randn(7),
    }
    path = tmp_path / "some" / "file.safetensors"
    store.write_tensors_in_turn(path, iter(wanted.items()))
    found = store.read_tensors(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(store.read_tensor(path, name), tensor)
    assert store.read_metadata(path) == {}
    first = path.read_bytes()
    store.write_tensors_in_turn(path, iter(wanted.items()))
    assert path.read_bytes() == first


def test_of_tensors_written_in_turn_that_fail_midway_nothing_is_left(tmp_path):
    def tensors():
        yield "first", torch.zeros(3)
        raise ValueError("the second cannot be had")

    path = tmp_path / "file.safetensors"
    store.write_tensors(path, {"old": torch.ones(2)})
    with pytest.raises(ValueError, match="the second"):
        store.write_tensors_in_turn(path, tensors())
    assert store.tensor_names(path) == ["old"]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
