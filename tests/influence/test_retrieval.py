"""Recall at k and reciprocal rank: by hand, with ties, windows and what was never ranked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.retrieval import recall_at, reciprocal_rank, target_ranks


def places(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


SCORES = torch.tensor([0.1, 0.9, 0.5, -0.3, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("target", "rank"),
    [
        ((1,), 1),
        ((0,), 4),
        ((3,), 6),
        ((2,), 3),  # tied with row 4: both come before
        ((4,), 3),
        ((3, 0), 4),  # two windows of a document: its best
        ((5, 1, 3), 1),
        ((), math.inf),
    ],
)
def test_the_rank_of_a_target_is_that_of_its_best_item_and_ties_count_against_it(target, rank):
    assert target_ranks(SCORES, [places(*target)]) == [rank]


def test_nothing_is_found_by_a_method_that_scores_all_alike():
    assert target_ranks(torch.zeros(500), [places(0)]) == [500]


@pytest.mark.parametrize(
    ("ranks", "at_1", "at_10", "at_100", "reciprocal"),
    [
        ([1.0, 10.0, 11.0, 101.0], 1 / 4, 2 / 4, 3 / 4, 1),
        ([4.0], 0, 1, 1, 1 / 4),
        ([200.0, math.inf], 0, 0, 0, 1 / 200),
        ([math.inf], 0, 0, 0, 0),
    ],
)
def test_recall_and_reciprocal_rank_by_hand(ranks, at_1, at_10, at_100, reciprocal):
    assert [recall_at(ranks, k) for k in (1, 10, 100)] == [at_1, at_10, at_100]
    assert reciprocal_rank(ranks) == reciprocal


def test_recall_of_no_target_is_refused():
    with pytest.raises(ValueError, match="no target at all"):
        recall_at([], 10)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_ranks_agree_with_a_sorted_list(values, data):
    at = data.draw(st.integers(0, len(values) - 1))
    [rank] = target_ranks(torch.tensor(values, dtype=torch.float64), [places(at)])
    ordered = sorted(values)
    assert rank == len(values) - ordered.index(values[at])
