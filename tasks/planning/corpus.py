"""How large a run's corpus is in sequences and tokens: as tokenised, or told from a sample."""

import itertools
import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks import store
from tasks.corpora import Corpus, Document, documents
from tasks.faraway import FarFile
from tasks.material import Tokenize
from tasks.origin import Scratch
from tasks.params import RunParams
from tasks.records import Record, data_files, unread

if TYPE_CHECKING:  # transformers is slow to import
    from tasks.models import Tokenizer

SAMPLE = 256  # documents
COUNTING = 2.0  # seconds, after which the documents of a large corpus are told from its bytes
CHARACTERS = 4  # a token, where no tokenizer is at hand: usual for English text


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """What stage `tokenize` makes of the corpus.

    Attributes:
        num_documents: read.
        num_sequences: the unit that is scored.
        num_tokens: of all of them.
        exact: whether the corpus was tokenised, or this is told from a sample.
        told: how it is known.
        name_bytes: of a sequence's name, on average.
    """

    num_documents: int
    num_sequences: int
    num_tokens: int
    exact: bool
    told: str
    name_bytes: float = 12.0

    @property
    def length(self) -> float:
        """Tokens of a sequence, on average."""
        return self.num_tokens / max(1, self.num_sequences)


def corpus_size(
    params: RunParams, root: Path, tokenize: Path, tokenizer: "Tokenizer | None"
) -> CorpusSize:
    """From artifacts/<run>/tokenize where that is of these params, else from a sample.

    Raises:
        ValueError: a corpus that cannot be read.
    """
    written = tokenize / "summary.json"
    if written.is_file():
        summary = store.read_json(written)
        wanted = params.tokenize.model_dump()
        limit = params.corpus.limit
        if (
            {key: summary.get(key) for key in wanted} == wanted
            and summary["corpus"]["path"] == params.corpus.path
            and (limit is None or summary["num_documents"] <= limit)
        ):
            sizes = [summary[f"num_{what}"] for what in ("documents", "sequences", "tokens")]
            return CorpusSize(*sizes, exact=True, told="as tokenised")
    return sampled_size(params, root, tokenizer)


def sampled_size(params: RunParams, root: Path, tokenizer: "Tokenizer | None") -> CorpusSize:
    """From the first documents, and a count of all."""
    corpus = Corpus.of(params.corpus, root)
    sample = list(itertools.islice(documents(corpus), SAMPLE))
    if not sample:
        raise ValueError(f"corpus.path: {corpus.path} holds no documents")
    number, how = count_documents(corpus)
    if tokenizer is None and isinstance(params.train, Scratch):
        tokenizer = _likely(sample, params.train.scratch.vocabulary)
    lengths = document_lengths(sample, params.tokenize, tokenizer)
    tokens = round(number * float(np.mean(lengths)))
    context = params.tokenize.context
    a_document = np.ceil(lengths / context).mean()
    packed = params.tokenize.mode == "pack"
    sequences = max(1, tokens // context) if packed else round(number * float(a_document))
    names = float(np.mean([len(document.id) for document in sample]))
    by = "their tokens" if tokenizer else f"{CHARACTERS} characters a token"
    told = f"estimated from {len(sample)} documents and {by}; {how}"
    return CorpusSize(number, sequences, tokens, exact=False, told=told, name_bytes=names)


def _likely(sample: list[Document], vocabulary: int) -> "Tokenizer":
    """A tokenizer like the one that stage `train` will train."""
    from tasks.scratch import train_tokenizer

    return train_tokenizer((document.text for document in sample), vocabulary)


def document_lengths(
    sample: list[Document], settings: Tokenize, tokenizer: "Tokenizer | None"
) -> np.ndarray:
    """Tokens of each document."""
    if tokenizer is None:
        ends = int(settings.bos) + int(settings.eos)
        return np.array([max(1, _characters(each) // CHARACTERS) + ends for each in sample])
    from tasks.windows import encode

    encoded = encode(tokenizer, sample, settings.bos, settings.eos)
    return np.array([len(each.tokens) for each in encoded])


def _characters(document: Document) -> int:
    return len(document.text) + sum(len(each["content"]) for each in document.messages)


def count_documents(corpus: Corpus) -> tuple[int, str]:
    """How many documents there are, and how that is known: counted, or told from the bytes."""
    files = data_files(corpus.path)
    found = unread(files, corpus.separator)
    begun, content, counted = time.monotonic(), list[bytes](), 0
    for counted, each in enumerate(itertools.islice(found, corpus.limit), start=1):
        if len(content) < SAMPLE:
            content.append(each.content if isinstance(each.content, bytes) else _bytes(each.read()))
        if counted % SAMPLE == 0 and time.monotonic() - begun > COUNTING:
            packed = any(each.file.suffix not in (".jsonl", ".txt") for each in files)
            text = b"".join(content)
            share = len(zlib.compress(text)) / len(text) if packed else 1.0
            size = sum(_size(each.file) for each in files)
            number = max(counted, round(size * len(content) / (share * len(text))))
            return min(number, corpus.limit or number), "their number from the files' sizes"
    return counted, "their number counted"


def _size(file: Path | FarFile) -> int:
    return (file.size or 0) if isinstance(file, FarFile) else file.stat().st_size


def _bytes(record: Record) -> bytes:
    return json.dumps(record.fields, ensure_ascii=False).encode()
