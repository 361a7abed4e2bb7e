"""Texts that say the same: equal words, or nearly the same runs of words (MinHash; Broder 1997).

Two texts are exact duplicates if their words agree, whatever case, spacing and punctuation. They
are near duplicates if the Jaccard similarity of their shingles, runs of five words, is at least
0.8. MinHash only proposes pairs; each is then held against the shingles themselves. So no pair is
ever taken wrongly, and one at 0.8 is overlooked with a probability of 0.2 % (at 0.9: 10⁻⁷).
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from tasks.spans import words

if TYPE_CHECKING:  # it brings SciPy, which is slow to import
    from datasketch import MinHash

SHINGLE = 5  # words
THRESHOLD = 0.8
# A pair of similarity s is proposed with probability 1 − (1 − s^r)^b, here b = 21 and r = 6.
BANDS, ROWS = 21, 6


def duplicate_groups(texts: Iterable[str]) -> list[int]:
    """For each text the place of the first that says the same; its own if no earlier one does.

    What is similar to a similar text belongs to the group too. The groups do not depend on the
    order of the texts.
    """
    first_of: dict[bytes, int] = {}  # each different text, and where it stands first
    heads: list[int] = []
    hashes: dict[int, NDArray[np.uint32]] = {}
    for place, text in enumerate(texts):
        found = words(text)
        # A text without any word is what it is, less its white space.
        normalised = " ".join(found or text.split()).encode()
        head = first_of.setdefault(hashlib.blake2b(normalised).digest(), place)
        heads.append(head)
        if head == place:
            hashes[place] = _hashes(shingles(found))
    joined = _join_near(hashes)
    return [_root(joined, head) for head in heads]


def shingles(found: Sequence[str]) -> set[str]:
    """The runs of five words; of fewer words, all of them as one run."""
    runs = range(max(1, len(found) - SHINGLE + 1)) if found else ()
    return {" ".join(found[at : at + SHINGLE]) for at in runs}


def similarity(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Jaccard similarity of two sets, given as sorted arrays; of two empty ones 0."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def _hashes(members: set[str]) -> NDArray[np.uint32]:
    digests = (hashlib.blake2b(each.encode(), digest_size=4).digest() for each in members)
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u4"))


def _join_near(hashes: dict[int, NDArray[np.uint32]]) -> dict[int, int]:
    """Near duplicates among different texts: from each place to an earlier one of its group."""
    from datasketch import MinHashLSH

    joined: dict[int, int] = {}
    proposed = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    with_words = [place for place, members in hashes.items() if len(members)]
    for place, sketch in zip(with_words, _sketches([hashes[at] for at in with_words]), strict=True):
        for other in cast("list[int]", proposed.query(sketch)):
            one, two = _root(joined, place), _root(joined, other)
            if one != two and similarity(hashes[place], hashes[other]) >= THRESHOLD:
                joined[max(one, two)] = min(one, two)
        proposed.insert(place, sketch, check_duplication=False)
    return joined


def _sketches(sets: Sequence[NDArray[np.uint32]]) -> "Iterable[MinHash]":
    from datasketch import MinHash

    return MinHash.generator(sets, num_perm=BANDS * ROWS, seed=1, hashfunc=int)


def _root(joined: dict[int, int], place: int) -> int:
    while place in joined:
        place = joined[place]
    return place
