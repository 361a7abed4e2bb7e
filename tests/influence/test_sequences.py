"""Batches: what is supervised, where the loss sits, how rows are grouped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.sequences import TokenBatch, batches_by_tokens


def tensors(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def ragged() -> TokenBatch:
    return TokenBatch.collate(
        [7, 3], tensors([1, 2, 3], [4, 5]), [x.bool() for x in tensors([0, 0, 1], [0, 1])]
    )


def test_collate_pads_on_the_right_and_supervises_no_padding():
    batch = ragged()
    assert batch.ids.tolist() == [7, 3]
    assert batch.tokens[0].tolist() == [1, 2, 3]
    assert batch.tokens[1, :2].tolist() == [4, 5]
    assert batch.supervised.tolist() == [[False, False, True], [False, True, False]]


def test_a_loss_sits_one_position_before_its_target():
    assert ragged().loss_positions.tolist() == [[False, True, False], [True, False, False]]


def test_the_last_position_never_carries_a_loss():
    supervised = torch.tensor([[False, True, True, True]])
    batch = TokenBatch(torch.tensor([0]), torch.zeros(1, 4, dtype=torch.long), supervised)
    assert batch.loss_positions.tolist() == [[True, True, True, False]]


def test_supervised_tokens_are_counted_without_padding_and_prompt():
    assert ragged().num_supervised == 2
    assert ragged().loss_positions.sum() == 2


def test_a_supervised_first_token_is_refused():
    with pytest.raises(ValueError, match="first"):
        TokenBatch(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[True, True]]))


def test_a_single_token_is_a_sequence_without_a_loss():
    batch = TokenBatch(torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[False]]))
    assert batch.loss_positions.tolist() == [[False]]
    assert batch.num_supervised == 0


def test_a_batch_that_moves_is_the_same_batch():
    batch, moved = ragged(), ragged().to("cpu")
    for field in ("ids", "tokens", "supervised"):
        assert torch.equal(getattr(moved, field), getattr(batch, field))


@given(st.lists(st.integers(1, 40), max_size=50), st.integers(1, 120))
def test_every_row_is_in_exactly_one_batch_and_batches_keep_the_budget(lengths, budget):
    batches = batches_by_tokens(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert rows
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget


@given(st.lists(st.integers(1, 40), max_size=50), st.integers(1, 120))
def test_batches_go_from_long_rows_to_short_ones(lengths, budget):
    in_order = [lengths[row] for rows in batches_by_tokens(lengths, budget) for row in rows]
    assert in_order == sorted(lengths, reverse=True)


def test_no_batch_could_have_taken_the_next_row():
    lengths = [5, 5, 5, 2, 2, 2, 2]
    assert [len(rows) for rows in batches_by_tokens(lengths, 10)] == [2, 2, 3]
    assert [len(rows) for rows in batches_by_tokens([30, 4, 4], 8)] == [1, 2]
