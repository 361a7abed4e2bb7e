"""The recall of a filter, from a random sample of what it rejected."""

import pytest
import torch

from influence.audit import FilterRecall


def recall(scores, selected, audited, num_rejected, k, seed=0) -> FilterRecall:
    return FilterRecall.of(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(selected, dtype=torch.bool),
        torch.tensor(audited, dtype=torch.bool),
        num_rejected,
        k,
        seed,
    )


def test_a_filter_that_missed_nothing_in_the_sample_has_recall_one():
    got = recall([5, 4, 3, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], 100, 3)
    assert got.recall == 1
    assert got.missed == 0
    assert (got.low, got.high) == (1, 1)


def test_each_audited_sequence_stands_for_its_share_of_the_rejected():
    """One of two audited beats the 2nd of the filter, so 50 of the 100 rejected: 2 / (2 + 50)."""
    got = recall([5, 4, 3, 4.5, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], 100, 2)
    assert got.missed == pytest.approx(50)
    assert got.recall == pytest.approx(2 / 52)
    assert got.k == 2


def test_a_sequence_kept_for_another_query_counts_once():
    got = recall([5, 4, 3, 9, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1], 100, 3)
    assert got.missed == pytest.approx(1)
    assert got.recall == pytest.approx(3 / 4)


def test_the_interval_contains_the_truth_about_95_times_in_100():
    """A known population: 6 of 300 rejected beat the filter's 20th; 100 are audited. 60 audits."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(20, dtype=torch.float64) + 10
    rejected = torch.cat([torch.full((30,), 40.0), torch.zeros(270)]).double()
    truth, hits = 20 / (20 + 30), 0
    for audit in range(60):
        sample = rejected[torch.randperm(300, generator=generator)[:100]]
        flags = torch.arange(120) < 20
        got = FilterRecall.of(torch.cat([kept, sample]), flags, ~flags, 300, 20, audit)
        hits += got.low <= truth <= got.high
    assert hits >= 51  # 57 ± 1.7 if exact; 51 is 3.5 standard deviations below


def test_a_filter_that_kept_fewer_than_k_is_refused():
    with pytest.raises(ValueError, match="3"):
        recall([5, 4, 0], [1, 1, 0], [0, 0, 1], 100, 3)
