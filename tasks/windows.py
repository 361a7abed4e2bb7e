"""From documents to the sequences that scores speak of: windows of tokens with stable names."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.corpora import Document
from tasks.marks import Marked, marked
from tasks.models import Tokenizer, boundary_token

Mode = Literal["document", "pack"]
# Tokenised together. While a tokenizer has a token, with its place in the text, it takes some 270
# bytes: documents as long as books must not meet there.
CHARACTERS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class Windows:
    """Sequences end to end; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Args:
        tokens: int32, all sequences.
        targets: which tokens a model is to predict, where anything comes before them.
        offsets: int64, one more than there are sequences.
        names: "doc", or "doc@offset" where the sequence begins `offset` tokens into "doc".
        documents: the documents that each sequence holds tokens of.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    names: list[str]
    documents: list[list[str]]

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """The targets, less the first token of each sequence, which nothing predicts."""
        supervised = self.targets.copy()
        supervised[self.offsets[:-1]] = False
        return supervised


@dataclass(frozen=True, slots=True)
class Plan:
    """Where all documents, end to end, are cut: `Windows` without the tokens."""

    offsets: NDArray[np.int64]
    names: list[str]
    documents: list[list[str]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a document, and which of them a model is to predict."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]


def encode(
    tokenizer: Tokenizer, documents: Sequence[Document], bos: bool, eos: bool
) -> list[Encoded]:
    """The tokens of each document, each on its own.

    A token is a target if it reaches into the completion, or into what an assistant says; of plain
    text all are. EOS is one, and BOS where all are.

    Whether BOS and EOS stand around it is decided by `bos` and `eos` alone, whatever the
    tokenizer would add by itself.

    Raises:
        ValueError: the tokenizer has no such token, or a text that already begins with BOS or
            ends with EOS; a chat template that is absent or does not build up its text.
    """
    before = [boundary_token(tokenizer, "bos")] if bos else []
    after = [boundary_token(tokenizer, "eos")] if eos else []
    found = []
    for group in _calls((document, marked(tokenizer, document)) for document in documents):
        texts = [marks.text for _, marks in group]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for (document, marks), tokens, places in zip(
            group, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            for which, doubled in (("bos", tokens[:1] == before), ("eos", tokens[-1:] == after)):
                if doubled and tokens:
                    _refuse_doubled(tokenizer, document, which)
            targets = [marks.reached(start, end) for start, end in places]
            whole = [marks.is_plain] * len(before) + targets + [True] * len(after)
            numbers = np.array([*before, *tokens, *after], np.int32)
            found.append(Encoded(numbers, np.array(whole, bool)))
    return found


def _calls(
    texts: Iterable[tuple[Document, Marked]],
) -> Iterator[list[tuple[Document, Marked]]]:
    """What is tokenised together; a text of more characters goes by itself."""
    group, characters = list[tuple[Document, Marked]](), 0
    for document, marks in texts:
        if group and characters + len(marks.text) > CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
        group.append((document, marks))
        characters += len(marks.text)
    if group:
        yield group


def _refuse_doubled(tokenizer: Tokenizer, document: Document, which: str) -> None:
    token = getattr(tokenizer, f"{which}_token")
    where = "begins" if which == "bos" else "ends"
    raise ValueError(
        f"{document.place}: document {document.id!r} {where} with the {which.upper()} token "
        f"{token!r} in its text, and tokenize.{which}: true would double it; "
        f"set tokenize.{which} to false or take it out of the text"
    )


def cut_windows(
    documents: list[str], encoded: Sequence[Encoded], mode: Mode, context: int
) -> Windows:
    """Documents cut by `plan_windows`, with their tokens.

    Args:
        documents: their names.
        encoded: of each document, BOS and EOS included where wanted.
        mode: as there.
        context: the longest sequence.
    """
    lengths = np.array([len(each.tokens) for each in encoded], dtype=np.int64)
    plan = plan_windows(documents, lengths, mode, context)
    stream = np.concatenate([np.zeros(0, np.int32), *(each.tokens for each in encoded)])
    targets = np.concatenate([np.zeros(0, np.bool_), *(each.targets for each in encoded)])
    return Windows(stream, targets, plan.offsets, plan.names, plan.documents)


def plan_windows(
    documents: list[str], lengths: NDArray[np.int64], mode: Mode, context: int
) -> Plan:
    """Where to cut documents into sequences of at most `context` tokens; none is lost or repeated.

    ``document``: every document begins a sequence, and a longer one goes on in further windows.
    ``pack``: documents follow each other and are cut every `context` tokens; the short tail stays.
    A document without tokens is in no sequence.

    Args:
        documents: their names.
        lengths: tokens of each document, BOS and EOS included where wanted.
        mode: as above.
        context: the longest sequence.
    """
    begins = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    if mode == "pack":
        starts = np.arange(0, begins[-1], context)
    else:
        starts = np.concatenate(
            [np.zeros(0, np.int64)]
            + [
                np.arange(begin, begin + n, context)
                for begin, n in zip(begins[:-1], lengths, strict=True)
            ]
        )
    offsets = np.append(starts, begins[-1]).astype(np.int64)
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
    return Plan(offsets, names, held)


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
