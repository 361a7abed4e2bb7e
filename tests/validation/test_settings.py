"""Every benchmark's params file is valid, names data that are there, and faults are told."""

from pathlib import Path

import pytest
import torch

from influence.layers import find_layers
from tasks.validation.datasets import load_data
from tasks.validation.networks import build
from tasks.validation.settings import benchmark_names, load_benchmark
from tests.conftest import ROOT

NAMES = ("cifar10", "concrete", "digits", "energy", "fashion", "mnist", "quick", "tinylm")
GIVEN = ("cifar10", "fashion")  # whose data are not embedded
quick = (ROOT / "params/benchmarks/quick.yaml").read_text("utf-8")


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """A project whose only benchmark is `quick` with a change."""
    assert old in quick
    folder = tmp_path / "params/benchmarks"
    folder.mkdir(parents=True)
    (folder / "quick.yaml").write_text(quick.replace(old, new), "utf-8")
    return tmp_path


def test_the_benchmarks_are_these(root: Path):
    assert tuple(benchmark_names(root)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_agrees_with_itself(root: Path, name: str):
    params = load_benchmark(root, name)
    assert params.runtime.dtype == params.dtype
    assert params.truth.epsilons[0] == 0.1
    assert params.damping.model_dump() == {"training": True}
    assert all(size.bit_count() == 1 for size in params.estimators.fit_sizes)
    if params.retraining:
        assert params.retraining.epochs == params.training.epochs


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(GIVEN)))
def test_a_benchmark_is_of_the_size_it_needs(root: Path, name: str):
    params = load_benchmark(root, name)
    splits = load_data(params.data, root, params.seeds[0], torch.float32)
    num_train, num_test = len(splits.train.ids), len(splits.test.ids)
    assert params.truth.examples <= num_train
    assert params.truth.queries <= num_test
    assert max(params.estimators.fit_sizes) <= num_train < 2 * max(params.estimators.fit_sizes) + 2
    model = build(params.network, splits, torch.float32, params.seeds[0])
    layers, _ = find_layers(model, params.layers)
    widest = max(min(layer.d_in, layer.d_out) for layer in layers)
    assert max(params.estimators.ranks) <= widest


@pytest.mark.parametrize("name", GIVEN)
def test_data_that_are_not_embedded_are_asked_for(root: Path, name: str):
    params = load_benchmark(root, name)
    if (root / params.data.model_dump()["images"]).exists():
        pytest.skip("the data are there")
    with pytest.raises(ValueError, match="put the files there"):
        load_data(params.data, root, 0, torch.float32)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("limit: 200", "limit: 0", "data.table.limit|data.limit"),
        ("  activation: tanh\n", "  activation: sine\n", "activation"),
        ("  checked: 10", "  unchecked: 10", "checked"),
        ("  widths: [16, 16]\n  activation: tanh", "  resnet: 20", "needs data.images"),
        (
            "  widths: [16, 16]\n  activation: tanh",
            "  blocks: 1\n  width: 8\n  heads: 2\n  hidden: 16",
            "text needs a transformer",
        ),
    ],
)
def test_a_fault_is_told_with_its_key(tmp_path: Path, old: str, new: str, told: str):
    root = changed(tmp_path, old, new)
    with pytest.raises(ValueError, match=told):
        load_benchmark(root, "quick")


def test_an_unknown_benchmark_is_told_which_there_are(root: Path):
    with pytest.raises(ValueError, match="concrete or digits"):
        load_benchmark(root, "../tinystories")
