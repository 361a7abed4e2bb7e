"""TF-IDF against Eq. 28 and 29 of the paper as printed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.tfidf import DocumentFrequency, presence, tfidf_scores
from tests import oracles

V = 7
DOCUMENTS = [[0, 1, 1, 1, 2], [1, 2], [3], [1, 3, 3], [5, 1, 0]]
token_lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=8)


def tensors(documents: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(document) for document in documents]


def scores(query: list[int], documents: list[list[int]]) -> list[float]:
    sequences = tensors(documents)
    idf = DocumentFrequency.of(sequences, V).idf()
    return tfidf_scores(torch.tensor(query), presence(sequences, V), idf).tolist()


@pytest.mark.parametrize("k1", [1.5, 0.2, 100.0])
@given(query=token_lists, documents=st.lists(token_lists, min_size=1, max_size=6))
def test_scores_are_equation_28_whatever_k1(k1, query, documents):
    """Existence is 0 or 1, so (k₁ + 1)e / (k₁ + e) = e."""
    wanted = [oracles.tfidf(query, document, documents, k1) for document in documents]
    assert scores(query, documents) == pytest.approx(wanted, rel=1e-12)


def test_a_query_token_counts_as_often_as_the_query_holds_it():
    once, twice = scores([2], DOCUMENTS), scores([2, 2], DOCUMENTS)
    assert twice == pytest.approx([2 * score for score in once], rel=1e-15)


def test_a_document_token_counts_once_however_often_it_is_there():
    assert scores([1, 0], DOCUMENTS)[0] == scores([1, 0], DOCUMENTS)[4]


def test_the_inverse_document_frequency_is_equation_29_also_for_tokens_never_seen():
    idf = DocumentFrequency.of(tensors(DOCUMENTS), V).idf()
    wanted = [oracles.idf(token, DOCUMENTS) for token in range(V)]
    assert idf.tolist() == pytest.approx(wanted, rel=1e-14)
    assert idf.dtype == torch.float64
    assert (idf > 0).all()


def test_documents_are_counted_and_not_occurrences():
    frequency = DocumentFrequency.of(tensors(DOCUMENTS), V)
    assert frequency.num_documents == 5
    assert frequency.counts.tolist() == [2, 4, 2, 2, 0, 1, 0]


def test_counts_of_shards_add():
    whole = DocumentFrequency.of(tensors(DOCUMENTS), V)
    parts = [DocumentFrequency.of(tensors(part), V) for part in (DOCUMENTS[:2], DOCUMENTS[2:])]
    merged = parts[0] + parts[1]
    assert merged.num_documents == whole.num_documents
    assert torch.equal(merged.counts, whole.counts)


def test_presence_says_which_document_holds_which_token():
    held = presence(tensors(DOCUMENTS), V)
    for row, document in enumerate(DOCUMENTS):
        assert held[row].tolist() == [token in document for token in range(V)]
