"""Kronecker factors on disk: half of a symmetric matrix, and all of what it says."""

import pytest
import torch

from influence.factors import Covariance, Factors
from tasks import store
from tasks.kronecker import (
    add_factors,
    covariance_names,
    covariance_size,
    packed,
    read_covariance,
    read_factors,
    unpacked,
    write_factors,
)


def symmetric(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.mT


@pytest.fixture
def factors() -> Factors:
    return Factors(
        {"mlp.up": Covariance(symmetric(4, 0), 7)},
        {"mlp.up": Covariance(symmetric(1, 1), 7), "mlp.gate": Covariance(symmetric(6, 2), 5)},
    )


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_what_is_packed_is_half_and_comes_back(size):
    matrix = symmetric(size, size)
    assert packed(matrix).tolist() == [
        matrix[i, j].item() for i in range(size) for j in range(i, size)
    ]
    assert torch.equal(unpacked(packed(matrix)), matrix)


def test_factors_are_read_as_they_were_written(tmp_path, factors):
    path = tmp_path / "factors.safetensors"
    write_factors(path, factors)
    found = read_factors(path)
    for side in ("inputs", "outputs"):
        wanted = getattr(factors, side)
        assert getattr(found, side).keys() == wanted.keys()
        for name, covariance in wanted.items():
            got = getattr(found, side)[name]
            assert torch.equal(got.sum, covariance.sum)
            assert got.num_tokens == covariance.num_tokens


def test_one_factor_is_read_without_the_others(tmp_path, factors):
    path = tmp_path / "factors.safetensors"
    write_factors(path, factors, torch.float32)
    assert covariance_names(path) == ["A/mlp.up", "S/mlp.gate", "S/mlp.up"]
    assert [covariance_size(path, name) for name in covariance_names(path)] == [4, 6, 1]
    got = read_covariance(path, "S/mlp.gate")
    assert torch.equal(got.sum, factors.outputs["mlp.gate"].sum.float())
    assert store.tensor_shape(path, "S/mlp.gate/upper") == (21,)


def test_files_are_added_factor_by_factor_and_a_layer_that_one_never_ran_counts_as_zero(
    tmp_path, factors
):
    fewer = Factors(factors.inputs, {"mlp.gate": factors.outputs["mlp.gate"]})
    parts = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    write_factors(parts[0], factors)
    write_factors(parts[1], fewer)
    most = add_factors(parts, tmp_path / "sum.safetensors", torch.float64)
    found, wanted = read_factors(tmp_path / "sum.safetensors"), factors + fewer
    assert most == 14
    for got, sums in ((found.inputs, wanted.inputs), (found.outputs, wanted.outputs)):
        assert got.keys() == sums.keys()
        for name in got:
            assert torch.equal(got[name].sum, sums[name].sum)
            assert got[name].num_tokens == sums[name].num_tokens
