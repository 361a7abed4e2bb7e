"""From documents to the sequences that scores speak of: windows of tokens with stable names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.corpora import Document
from tasks.models import Tokenizer, boundary_token

Mode = Literal["document", "pack"]


@dataclass(frozen=True, slots=True)
class Windows:
    """Sequences end to end; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Args:
        tokens: int32, all sequences.
        offsets: int64, one more than there are sequences.
        names: "doc", or "doc@offset" where the sequence begins `offset` tokens into "doc".
        documents: the documents that each sequence holds tokens of.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    names: list[str]
    documents: list[list[str]]

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """Every token is a target but the first of its sequence, which nothing predicts."""
        supervised = np.ones(len(self.tokens), dtype=np.bool_)
        supervised[self.offsets[:-1]] = False
        return supervised


def encode(
    tokenizer: Tokenizer, documents: Sequence[Document], bos: bool, eos: bool
) -> list[NDArray[np.int32]]:
    """The tokens of each document, each on its own.

    Whether BOS and EOS stand around it is decided by `bos` and `eos` alone, whatever the
    tokenizer would add by itself.

    Raises:
        ValueError: the tokenizer has no such token, or a text that already begins with BOS.
    """
    before = [boundary_token(tokenizer, "bos")] if bos else []
    after = [boundary_token(tokenizer, "eos")] if eos else []
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)
    for document, tokens in zip(documents, encoded["input_ids"], strict=True):
        if bos and tokens[:1] == before:
            raise ValueError(
                f"{document.place}: document {document.id!r} begins with the BOS token "
                f"{tokenizer.bos_token!r} in its text, and tokenize.bos: true would double it; "
                "set tokenize.bos to false or take it out of the text"
            )
    return [np.array([*before, *row, *after], np.int32) for row in encoded["input_ids"]]


def cut_windows(
    documents: list[str], tokens: Sequence[NDArray[np.int32]], mode: Mode, context: int
) -> Windows:
    """Cut documents into sequences of at most `context` tokens; no token is lost or repeated.

    ``document``: every document begins a sequence, and a longer one goes on in further windows.
    ``pack``: documents follow each other and are cut every `context` tokens; the short tail stays.
    A document without tokens is in no sequence.

    Args:
        documents: their names.
        tokens: of each document, BOS and EOS included where wanted.
        mode: as above.
        context: the longest sequence.
    """
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    stream = np.concatenate([np.zeros(0, np.int32), *tokens])
    if mode == "pack":
        starts = np.arange(0, len(stream), context)
    else:
        starts = np.concatenate(
            [np.zeros(0, np.int64)]
            + [
                np.arange(begin, begin + n, context)
                for begin, n in zip(begins[:-1], lengths, strict=True)
            ]
        )
    offsets = np.append(starts, len(stream)).astype(np.int64)
    # side="right" passes over documents without tokens, which begin where the next one does.
    first = np.searchsorted(begins, offsets[:-1], side="right") - 1
    last = np.searchsorted(begins, offsets[1:], side="left")
    into = offsets[:-1] - begins[first]
    names = [
        documents[at] + (f"@{offset}" if offset else "")
        for at, offset in zip(first.tolist(), into.tolist(), strict=True)
    ]
    held = [
        [documents[at] for at in range(one, other) if lengths[at]]
        for one, other in zip(first.tolist(), last.tolist(), strict=True)
    ]
    return Windows(stream, offsets, names, held)


def sequence_key(name: str) -> int:
    """A sequence's key: the first 8 bytes of blake2b of its name, less the sign bit.

    It depends on nothing else: not on order, shard or the rest of the corpus.
    """
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big") & (2**63 - 1)


def sequence_keys(names: Sequence[str]) -> NDArray[np.int64]:
    """The keys of all sequences.

    Raises:
        ValueError: two sequences with one key, which means two with one name (a document called
            "a@128" beside the long document "a"), or a coincidence of 1 in 10^19 a pair.
    """
    found: dict[int, str] = {}
    for name in names:
        key = sequence_key(name)
        if key in found:
            raise ValueError(
                f"sequences {found[key]!r} and {name!r} have the same key; every sequence wants "
                "one of its own: rename the document"
            )
        found[key] = name
    return np.fromiter(found, dtype=np.int64, count=len(found))
