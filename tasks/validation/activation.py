"""Benchmarks in `params/active.yaml`: what DVC watches for each, written and checked."""

from pathlib import Path

from tasks.active import BenchmarkEntry, load_active, write_active
from tasks.params import ACTIVE
from tasks.validation.settings import (
    BenchmarkParams,
    Data,
    Digits,
    Images,
    Table,
    benchmark_file,
    load_benchmark,
)
from tasks.yamlfile import read_editable

# The digits come with scikit-learn; this folder only says so. DVC wants some file to watch.
DIGITS = "data/digits"


def data_path(data: Data) -> str:
    """The file or folder of a benchmark's data."""
    if isinstance(data, Digits):
        return DIGITS
    if isinstance(data, Table):
        return data.table
    return data.images if isinstance(data, Images) else data.text


def check_active_benchmark(root: Path, name: str, params: BenchmarkParams) -> None:
    """That `params/active.yaml` says of a benchmark what its params file says.

    Raises:
        ValueError: with the command that repairs it.
    """
    told, repair = load_active(root).benchmarks.get(name), f"run `python -m flows activate {name}`"
    if told is None:
        raise ValueError(
            f"{ACTIVE}: benchmark {name!r} is not there, so DVC has no stage for it; {repair}"
        )
    if told.data != (path := data_path(params.data)):
        raise ValueError(
            f"{ACTIVE}: `benchmarks.{name}.data`: given {told.data!r}, but {benchmark_file(name)} "
            f"has {path!r}; {repair}"
        )


def check_data(root: Path, name: str, params: BenchmarkParams) -> None:
    """That the data are there.

    Raises:
        ValueError: naming the path and what to do.
    """
    path = data_path(params.data)
    if not (root / path).exists():
        raise ValueError(
            f"{benchmark_file(name)}: `data`: given {path!r}, but {root / path} does not exist; "
            "correct the path (it starts at the project's root) or put the data there"
        )


def activate_benchmark(root: Path, name: str) -> bool:
    """Write a benchmark's entry into `params/active.yaml`; whether anything changed.

    The file's comments stay. The benchmark's params file is checked first, and that its data are
    there.
    """
    params = load_benchmark(root, name)
    check_data(root, name, params)
    load_active(root)
    content = read_editable(root / ACTIVE)
    content["benchmarks"][name] = BenchmarkEntry(data=data_path(params.data)).model_dump()
    return write_active(root, content)


def deactivate_benchmark(root: Path, name: str) -> bool:
    """Take a benchmark out of `params/active.yaml`; whether it was there. Its results stay."""
    content = read_editable(root / ACTIVE)
    content["benchmarks"].pop(name, None)
    return write_active(root, content)
