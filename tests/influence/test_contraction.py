"""Every form of a contraction is the same number, and the plan takes the cheaper one."""

import itertools

import pytest
import torch

from influence import contraction
from influence.contraction import ByToken, forms_gradients, meet, meet_blockwise
from influence.lowrank import LowRank
from tests import oracles
from tests.influence import models


def matrices(q: int, o: int, i: int, rank: int | None) -> LowRank:
    generator = torch.Generator().manual_seed(5)
    return LowRank.of(torch.randn(q, o, i, generator=generator, dtype=torch.float64), rank)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("forms_gradient", [True, False])
def test_every_form_is_the_inner_product_with_the_sequence_gradient(has_bias, rank, forms_gradient):
    io = models.random_io(0, has_bias=has_bias)
    query = matrices(4, 2, 3 + has_bias, rank)
    by_token = ByToken.of(query, has_bias)
    got = meet(query.dense(), io.gradient()) if forms_gradient else by_token(io)
    assert got.shape == (4, 3)
    for q, n in itertools.product(range(4), range(3)):
        gradient = sum(
            torch.outer(ds, torch.cat([a, a.new_ones(int(has_bias))]))
            for ds, a in zip(io.ds[n], io.a[n], strict=True)
        )
        wanted = torch.dot(oracles.vec(query.left[q] @ query.right[q]), oracles.vec(gradient))
        torch.testing.assert_close(got[q, n], wanted)


@pytest.mark.parametrize("has_bias", [True, False])
def test_tokens_are_the_terms_of_the_sum(has_bias):
    io = models.random_io(0, has_bias=has_bias)
    query = matrices(4, 2, 3 + has_bias, 2)
    got = ByToken.of(query, has_bias).tokens(io)
    assert got.shape == (4, 3, io.a.shape[1])
    for q, n, t in itertools.product(range(4), range(3), range(io.a.shape[1])):
        a = torch.cat([io.a[n, t], io.a.new_ones(int(has_bias))])
        torch.testing.assert_close(got[q, n, t], io.ds[n, t] @ query.left[q] @ query.right[q] @ a)


@pytest.mark.parametrize("cached", [1, 40, 10**6])
@pytest.mark.parametrize("rank", [2, None])
def test_a_block_at_a_time_is_the_whole(monkeypatch, cached, rank):
    monkeypatch.setattr(contraction, "CACHED", cached)
    monkeypatch.setattr(contraction, "QUERIES", 3)
    query = matrices(7, 5, 4, rank)
    gradients = matrices(6, 5, 4, None).dense()
    wanted = torch.einsum("qoi,noi->qn", query.left @ query.right, gradients)
    torch.testing.assert_close(meet(query.dense(), gradients), wanted)
    torch.testing.assert_close(meet_blockwise(query, gradients.split(4)), wanted)


def test_few_queries_of_low_rank_go_by_token_and_many_form_gradients():
    few, many = (LowRank(torch.zeros(num, 2048, 32), torch.zeros(num, 32, 512)) for num in (8, 256))
    endless = float("inf")
    assert not forms_gradients(few, 512, endless)
    assert forms_gradients(many, 512, endless)
    assert not forms_gradients(many, 4, endless)
    assert not forms_gradients(many, 512, 2.0)  # their matrices would be made for two sequences
