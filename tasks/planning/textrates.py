"""How fast text is turned into tokens here, and searched for the words of queries: a sample."""

import time
from dataclasses import dataclass

import torch

from tasks.corpora import Corpus, documents
from tasks.filter import words
from tasks.models import Tokenizer
from tasks.params import RunParams, Tfidf
from tasks.windows import encode

SAMPLE = 128  # documents
PASSES = 2  # of stage filter over the corpus: terms are counted, then scored


@dataclass(frozen=True, slots=True)
class TextRates:
    """Seconds a document of `tokenize`, and seconds a token of `filter`."""

    tokenize: float
    filter: float


def text_rates(params: RunParams, corpus: Corpus, tokenizer: Tokenizer) -> TextRates:
    """Timed on the first documents."""
    sample = list(documents(corpus, 0, SAMPLE))
    settings = params.tokenize
    begun = time.perf_counter()
    encoded = encode(tokenizer, sample, settings.bos, settings.eos)
    tokenized = time.perf_counter() - begun
    rows = [torch.from_numpy(each.tokens[: settings.context]) for each in encoded]
    by_words = isinstance(params.filter, Tfidf) and params.filter.terms == "words"
    sought = torch.arange(32)
    begun = time.perf_counter()
    for row in rows:
        if by_words:
            words(tokenizer.batch_decode([row.tolist()], skip_special_tokens=True)[0])
        else:
            torch.where(sought[torch.searchsorted(sought, row).clamp(max=31)] == row, 1, 0)
    searched = time.perf_counter() - begun
    num_tokens = sum(len(row) for row in rows)
    return TextRates(tokenized / len(sample), PASSES * searched / max(1, num_tokens))
