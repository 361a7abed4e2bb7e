"""Baselines without gradients: hidden states, and tokens that query and sequence share."""

import bm25s
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.examples import Batch
from influence.objectives import forward
from influence.sequences import TokenBatch
from influence.tfidf import DocumentFrequency, presence, tfidf_scores
from tasks.validation.subject import Subject


def similarities(subject: Subject) -> dict[str, Float[Tensor, "q n"]]:
    """Scores of every training example by each baseline that the data allow."""
    queries, train = subject.queries, subject.train
    hidden = [_hidden(subject.model, batch) for batch in (queries, train)]
    unit = [states / states.norm(dim=1, keepdim=True).clamp(min=1e-30) for states in hidden]
    found = {"hidden_cosine": unit[0] @ unit[1].T}
    if isinstance(train, TokenBatch) and isinstance(queries, TokenBatch):
        found["tfidf"] = _tfidf(queries, train, subject.splits.num_outputs)
        found["bm25"] = _bm25(queries, train)
    return found


@torch.no_grad()
def _hidden(model: nn.Module, batch: Batch) -> Float[Tensor, "n d"]:
    """What goes into the last linear layer, averaged over positions."""
    *_, last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        forward(model, batch)
    finally:
        handle.remove()
    states = seen[0].double()
    return states.mean(dim=1) if states.ndim == 3 else states


def _tfidf(queries: TokenBatch, train: TokenBatch, vocabulary: int) -> Float[Tensor, "q n"]:
    """Eq. 28 of the paper over tokens."""
    rows = list(train.tokens)
    idf = DocumentFrequency.of(rows, vocabulary).idf()
    held = presence(rows, vocabulary)
    return torch.stack([tfidf_scores(query, held, idf) for query in queries.tokens])


def _bm25(queries: TokenBatch, train: TokenBatch) -> Float[Tensor, "q n"]:
    """Okapi BM25 (k₁ = 1.5, b = 0.75) over tokens."""
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(_words(train), show_progress=False)
    scores = [torch.as_tensor(index.get_scores(query)).double() for query in _words(queries)]
    return torch.stack(scores)


def _words(batch: TokenBatch) -> list[list[str]]:
    return [[str(token) for token in row] for row in batch.tokens.tolist()]
