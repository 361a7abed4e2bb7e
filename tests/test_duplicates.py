"""Duplicates: equal words, nearly equal runs of words, and what only looks alike."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import score, store, tokenize, train
from tasks.attributed import PassReference
from tasks.duplicates import SHINGLE, THRESHOLD, duplicate_groups, shingles
from tasks.tables import write_duplicates
from tests.small_run import SECTIONS, run_stage, stage_context, write_lines

VOCABULARY = [f"word{number}" for number in range(500)]


def story(seed: int, length: int = 100) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def jaccard(one: str, other: str) -> float:
    """Of all runs of five words, the slow obvious way."""
    runs = [
        {tuple(text.split()[at : at + SHINGLE]) for at in range(len(text.split()) - SHINGLE + 1)}
        for text in (one, other)
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def changed(tokens: list[str], places: list[int]) -> str:
    return " ".join(f"other{at}" if at in places else word for at, word in enumerate(tokens))


def groups(texts: list[str]) -> set[frozenset[str]]:
    """The texts themselves, grouped: what must not depend on their order."""
    found: dict[int, set[str]] = {}
    for text, head in zip(texts, duplicate_groups(texts), strict=True):
        found.setdefault(head, set()).add(text)
    return {frozenset(members) for members in found.values()}


def test_case_spacing_and_punctuation_make_no_difference() -> None:
    texts = ["The cat sat, then left.", "a dog", "the  cat sat\nthen LEFT", "A dog!", "two dogs"]
    assert duplicate_groups(texts) == [0, 1, 0, 1, 4]


def test_texts_without_a_word_are_equal_only_if_they_are() -> None:
    assert duplicate_groups(["", "…", " ", "!?", "… "]) == [0, 1, 0, 3, 1]
    assert duplicate_groups([]) == []


def test_near_is_what_shares_four_fifths_of_its_runs_of_words() -> None:
    base = story(1)
    near, far = changed(base, [50]), changed(base, [20, 40, 60, 80])
    assert jaccard(" ".join(base), near) > THRESHOLD > jaccard(" ".join(base), far)
    assert duplicate_groups([" ".join(base), far, near, " ".join(story(2))]) == [0, 1, 0, 3]


def test_the_same_words_in_another_order_are_another_text() -> None:
    base = story(3)
    assert duplicate_groups([" ".join(base), " ".join(sorted(base))]) == [0, 1]


def test_what_is_near_to_a_near_one_belongs_to_the_group() -> None:
    base = story(4)
    texts = [changed(base, []), changed(base, [30, 31, 60]), changed(base, [30])]
    assert jaccard(texts[0], texts[1]) < THRESHOLD < jaccard(texts[1], texts[2])
    assert duplicate_groups(texts) == [0, 0, 0]


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    """Of 300 stories 40 have a copy, exact or with one word changed, anywhere in the corpus."""
    stories = [story(seed, 120) for seed in range(300)]
    planted = {" ".join(words): changed(words, [at]) for at, words in enumerate(stories[:40])}
    corpus = [" ".join(words) for words in stories] + list(planted.values())
    random.Random(0).shuffle(corpus)
    assert {each for each in groups(corpus) if len(each) > 1} == {
        frozenset(pair) for pair in planted.items() if pair[0] != pair[1]
    }


@pytest.mark.parametrize("length", range(1, 2 * SHINGLE))
def test_a_text_has_a_run_for_each_place_that_a_run_can_begin_at(length: int) -> None:
    assert len(shingles([f"w{number}" for number in range(length)])) == max(1, length - SHINGLE + 1)


@given(st.lists(st.text(max_size=30), max_size=12), st.randoms(use_true_random=False))
def test_groups_of_any_texts_do_not_depend_on_their_order(
    texts: list[str], order: random.Random
) -> None:
    shuffled = list(texts)
    order.shuffle(shuffled)
    assert groups(shuffled) == groups(texts)
    for place, head in enumerate(duplicate_groups(texts)):
        assert head <= place
        assert duplicate_groups(texts)[head] == head


SHORT = st.lists(st.sampled_from(["a", "b", "c"]), max_size=SHINGLE)


@given(SHORT, SHORT)
def test_short_texts_are_duplicates_only_if_their_words_are(
    one: list[str], other: list[str]
) -> None:
    """With no more words than a run has, nearly the same would be the same."""
    assert (duplicate_groups([" ".join(one), " ".join(other)]) == [0, 0]) == (one == other)


def test_candidates_of_a_run_are_grouped_by_their_text(tmp_path: Path) -> None:
    """Of five stories one comes again in capitals and one with a word changed."""
    base = [" ".join(f"{word} cat" for word in story(seed, 40)) for seed in range(3)]
    texts = [base[0], base[1], base[0].upper(), base[2], base[1].replace("cat", "dog", 1)]
    write_lines(
        tmp_path / "corpus.jsonl",
        [{"id": f"s{at}", "text": text} for at, text in enumerate(texts)],
    )
    sections = {"tokenize": SECTIONS["tokenize"] | {"context": 512}}
    for name, stage in (("train", train), ("tokenize", tokenize)):
        run_stage(tmp_path, name, stage, **sections)
    context = stage_context(tmp_path, "score", **sections)
    groups = score.find_duplicates(context, PassReference.of(context), [0, 1, 2, 4])
    assert groups == {0: 0, 1: 1, 2: 0, 4: 1}
    assert score.count_duplicates(groups) == {"num_candidates": 4, "num_repeated": 2}
    write_duplicates(context, groups)
    rows = store.read_table(context.out / "duplicates.parquet").to_pylist()
    assert [(row["sequence"], row["group"]) for row in rows] == [
        ("s0", 0), ("s2", 0), ("s1", 1), ("s4", 1),
    ]  # fmt: skip
