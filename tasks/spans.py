"""Exact word spans that one text shares with another: at least three words, whatever their case.

A word is a run of letters and digits, apostrophes inside it included; an ideograph or a kana is a
word by itself. What stands between two words (a comma, a full stop) has to agree too, except that
all white space is alike, so that a line break does not hide a quotation.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

# Scripts written without spaces would otherwise make a word of a whole sentence.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+(?:['’](?:(?![{_UNSPACED}])\w)+)*")
_SPACE = re.compile(r"\s+")


class Span(NamedTuple):
    """Half-open range of characters."""

    start: int
    stop: int


def shared_spans(text: str, reference: str, min_words: int = 3) -> list[Span]:
    """Maximal spans of `text` whose words stand next to each other in `reference` as well.

    Sorted by start; two of them may overlap (each is shared, their union need not be), but none
    lies inside another. `covered` joins them for display.
    """
    if min_words < 1:
        raise ValueError(f"min_words is {min_words}: a shared span has at least 1 word")
    ours, theirs = _Words.of(text), _Words.of(reference)
    starts: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position in range(len(theirs.words) - min_words + 1):
        starts[tuple(theirs.words[position : position + min_words])].append(position)
    spans: list[Span] = []
    reached = 0  # words before this one are inside the last span
    for first in range(len(ours.words) - min_words + 1):
        seeds = starts.get(tuple(ours.words[first : first + min_words]), [])
        length = max((_run(ours, first, theirs, at) for at in seeds), default=0)
        if length >= min_words and first + length > reached:
            reached = first + length
            spans.append(Span(ours.places[first].start, ours.places[reached - 1].stop))
    return spans


def words(text: str) -> list[str]:
    """The words of a text in its order, whatever their case."""
    return [_folded(found.group()) for found in _WORD.finditer(text)]


def covered(spans: Iterable[Span]) -> list[Span]:
    """The same characters as disjoint ranges in order."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


class _Words(NamedTuple):
    words: list[str]
    gaps: list[str]  # gaps[i] stands between word i and word i + 1
    places: list[Span]

    @classmethod
    def of(cls, text: str) -> "_Words":
        places = [Span(*found.span()) for found in _WORD.finditer(text)]
        words = [_folded(text[start:stop]) for start, stop in places]
        gaps = [
            _SPACE.sub(" ", text[before.stop : after.start]) for before, after in pairwise(places)
        ]
        return cls(words, gaps, places)


def _folded(word: str) -> str:
    return word.casefold().replace("’", "'")


def _run(ours: _Words, first: int, theirs: _Words, at: int) -> int:
    """Number of words that agree from `first` and `at` on, gaps between them included."""
    limit = min(len(ours.words) - first, len(theirs.words) - at)
    length = 0
    while length < limit and ours.words[first + length] == theirs.words[at + length]:
        length += 1
        if length < limit and ours.gaps[first + length - 1] != theirs.gaps[at + length - 1]:
            break
    return length
