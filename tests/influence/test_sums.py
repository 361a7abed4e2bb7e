"""Long sums lose nothing to the pass's dtype, and half a symmetric product is the whole."""

import math

import pytest
import torch

from influence.sums import BLOCK, CARRY, LongSum, UpperMoment, gathered


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("width", [3, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 1300, 1536])
def test_a_second_moment_by_blocks_is_the_whole_product(width):
    """Few additions or many; in float64 as in float32, where a long sum goes on in float64."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for number in (2, CARRY + 2):
            x = random(3 * number, width, dtype=dtype)
            moment = UpperMoment(width, x)
            for part in x.split(3):
                moment.add(part)
            into = torch.full((width, width), math.nan, dtype=torch.float64)
            moment.close(into)
            assert torch.equal(into, into.mT)
            wanted = x.double().mT @ x.double()
            torch.testing.assert_close(into, wanted, rtol=tolerance, atol=tolerance)


def test_a_second_moment_keeps_little_more_than_one_half():
    width = 8 * BLOCK
    sums = UpperMoment(width, random(1))._sums
    assert sum(each.open().numel() for each in sums) == width**2 * 9 / 16


def test_rows_are_gathered_in_order_and_without_the_others():
    x, places = random(9, 4), torch.tensor([7, 0, 3])
    assert torch.equal(gathered(x, places), x[places])
    assert gathered(x, places[:0]).shape == (0, 4)


@pytest.mark.parametrize("number", [1, CARRY, CARRY + 1, 3 * CARRY + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_sum_is_the_sum(number, dtype):
    parts = random(number, 3, 2, dtype=dtype)
    total = LongSum(3, 2, parts)
    for part in parts:
        total.open().add_(part)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert total.total().dtype == torch.float64
    torch.testing.assert_close(total.total(), parts.double().sum(0), rtol=0, atol=tolerance)
    total.open().add_(parts[0])  # it can go on after it was read
    wanted = parts.double().sum(0) + parts[0].double()
    torch.testing.assert_close(total.total(), wanted, rtol=0, atol=tolerance)


def test_small_terms_survive_beside_a_large_sum():
    """In float32 alone, 1 added to 2²⁴ is lost every time."""
    total = LongSum(1, 1, torch.zeros(1, dtype=torch.float32))
    total.open().add_(2.0**24)
    for _ in range(10 * CARRY):
        total.open().add_(1.0)
    assert float(total.total()) - 2**24 >= 9 * CARRY


def test_a_half_precision_pass_is_summed_in_float32():
    total = LongSum(1, 1, torch.zeros(1, dtype=torch.bfloat16))
    assert total.dtype == torch.float32
