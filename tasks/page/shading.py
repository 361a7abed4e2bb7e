"""Token text as shaded and marked pieces: what the templates print between two tags.

A token carries the influence of the update at its own position, which trains the model to predict
the *next* token (Grosse et al. 2023, §3.3); the hint of a piece therefore names the next token.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.page.numbers import Nats
from tasks.spans import Span, covered

LEVELS = 6
# Influence is heavy-tailed: shaded in proportion, one token would be visible and the rest white.
# The colours of the levels are even steps for the eye, so the curve is in one place, here.
_CURVE = 0.6
_HINT_LENGTH = 18
_WALK = 24  # tokens that an end of the window may move
_SENTENCE_ENDS = (".", "!", "?", '"', "”", "。")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one look. level: -6 … 6, 0 is unshaded; hint: its influence in words, or ""."""

    text: str
    level: int
    hint: str


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces next to each other, all inside a span shared with the query, or all outside."""

    marked: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class ShadedText:
    """The text before, inside and after the window that is read first."""

    before: tuple[Group, ...]
    window: tuple[Group, ...]
    after: tuple[Group, ...]
    num_hidden: int  # tokens outside the window


def levels(influence: ArrayLike) -> NDArray[np.int64]:
    """Shade of every entry, -6 … 6, in the scale of the strongest; the shape is kept."""
    values = np.asarray(influence, dtype=np.float64)
    largest = np.abs(values).max(initial=0.0)
    shares = np.abs(values) / largest if largest else np.zeros_like(values)
    return (np.sign(values) * np.rint(LEVELS * shares**_CURVE)).astype(np.int64)


def shaded_text(
    tokens: Sequence[str],
    influence: Sequence[float],
    marks: Sequence[Span],
    window_tokens: int,
    nats: Nats,
) -> ShadedText:
    """`"".join(tokens)` cut where the shade, a mark or the window begins or ends.

    influence: nats, one a token. marks: ranges of characters. A ValueError where lengths differ.
    """
    if len(tokens) != len(influence):
        raise ValueError(
            f"{len(tokens)} tokens with {len(influence)} token influences: wanted one each"
        )
    fragments = _fragments(tokens, levels(influence).tolist(), covered(marks))
    first, last = window(influence, window_tokens, tokens)
    groups = [
        _groups([one for one in fragments if one.token in part], tokens, influence, nats)
        for part in (range(first), range(first, last), range(last, len(tokens)))
    ]
    return ShadedText(*groups, num_hidden=len(tokens) - (last - first))


def window(influence: Sequence[float], width: int, tokens: Sequence[str]) -> tuple[int, int]:
    """The `width` neighbouring tokens with the largest Σ influence²: the strongest are seen.

    Both ends then move outwards to where a sentence or at least a word starts. The whole text
    where little would stay hidden: that is not worth a click.
    """
    total = len(influence)
    if total <= 1.2 * width:
        return 0, total
    sums = [0.0, *accumulate(value * value for value in influence)]
    first = max(range(total - width + 1), key=lambda at: (sums[at + width] - sums[at], -at))
    last = first + width
    first = _border(tokens, first, -1)
    last = _border(tokens, last, 1)
    while first < last and tokens[first].isspace():
        first += 1
    while first < last and tokens[last - 1].isspace():
        last -= 1
    return (first, last) if total - (last - first) > width / 5 else (0, total)


def _border(tokens: Sequence[str], at: int, step: int) -> int:
    """The nearest start of a sentence from `at` on, else of a word, else `at` (-> 0 … len)."""
    word: int | None = None
    for place in range(at, at + step * (_WALK + 1), step):
        if not 0 < place < len(tokens):
            return min(max(place, 0), len(tokens))
        starts_word = tokens[place][:1].isspace() or tokens[place - 1][-1:].isspace()
        if starts_word and _ends_sentence(tokens[place - 1]):
            return place
        if starts_word and word is None:
            word = place
    return at if word is None else word


def _ends_sentence(token: str) -> bool:
    return token.endswith("\n") or token.rstrip()[-1:] in _SENTENCE_ENDS


@dataclass(frozen=True, slots=True)
class _Fragment:
    """A token, or the part of one on one side of the edge of a mark."""

    token: int
    text: str
    level: int
    marked: bool


def _fragments(
    tokens: Sequence[str], shades: Sequence[int], spans: Sequence[Span]
) -> list[_Fragment]:
    fragments: list[_Fragment] = []
    edges = sorted({edge for span in spans for edge in span})
    start = 0
    for index, token in enumerate(tokens):
        stop = start + len(token)
        inside = edges[bisect_right(edges, start) : bisect_left(edges, stop)]
        bounds = [start, *inside, stop]
        for left, right in pairwise(bounds):
            text = token[left - start : right - start]
            # Spans are disjoint, so an odd number of edges up to here means: inside one.
            marked = bisect_right(edges, left) % 2 == 1
            fragments.append(_Fragment(index, text, shades[index], marked))
        start = stop
    return fragments


def _groups(
    fragments: Sequence[_Fragment], tokens: Sequence[str], influence: Sequence[float], nats: Nats
) -> tuple[Group, ...]:
    """Fragments by mark and, inside, by look; the two faintest looks are most of the file."""
    groups: list[Group] = []
    for marked, members in groupby(fragments, key=lambda fragment: fragment.marked):
        pieces: list[Piece] = []
        for shade, run in groupby(members, key=lambda fragment: fragment.level):
            together = list(run)
            for part in [together] if abs(shade) <= 1 else [[fragment] for fragment in together]:
                hint = _hint([one.token for one in part], tokens, influence, nats)
                text = "".join(one.text for one in part)
                pieces.append(Piece(text, shade, hint if shade else ""))
        groups.append(Group(marked, tuple(pieces)))
    return tuple(groups)


def _hint(
    members: Sequence[int], tokens: Sequence[str], influence: Sequence[float], nats: Nats
) -> str:
    """ "+0.00012 → dog": the influence, and the token whose prediction the update trains."""
    first, last = members[0], members[-1]
    if first != last:
        total = sum(influence[first : last + 1])
        return f"{nats.signed(total, nats.decimals + 1)} over {last + 1 - first} tokens"
    following = tokens[last + 1] if last + 1 < len(tokens) else ""
    shown = following.strip(" ").replace("\n", "↵") or ("␣" if following else "end")
    if len(shown) > _HINT_LENGTH:
        shown = shown[:_HINT_LENGTH] + "…"
    return f"{nats.signed(influence[last], nats.decimals + 1)} → {shown}"
