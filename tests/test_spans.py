"""Exact word spans shared by two texts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.spans import Span, covered, shared_spans


def shared(text: str, reference: str, min_words: int = 3) -> list[str]:
    return [text[start:stop] for start, stop in shared_spans(text, reference, min_words)]


def test_a_span_has_three_words_or_it_is_none() -> None:
    assert shared("the little dog ran", "a little dog sat") == []
    assert shared("the little dog ran", "the little dog sat") == ["the little dog"]


def test_case_does_not_matter_and_the_text_keeps_its_own() -> None:
    assert shared("ONCE Upon a Time", "once upon a time") == ["ONCE Upon a Time"]
    assert shared("Die STRASSE ist lang", "die Straße ist lang") == ["Die STRASSE ist lang"]


def test_a_span_begins_and_ends_with_whole_words() -> None:
    assert shared("her cat sat down", "cat sat downstairs with her") == []
    assert shared("scat sat down here", "cat sat down here") == ["sat down here"]


def test_punctuation_between_words_has_to_agree_and_at_the_ends_it_is_left_out() -> None:
    assert shared("Stop. Look at me!", "stop, look at me") == ["Look at me"]
    assert shared('"Thank you, Mom!" he said.', "(thank you, mom)") == ["Thank you, Mom"]


def test_a_line_break_is_a_space() -> None:
    assert shared("one day\n\nthe dog", "One day the dog") == ["one day\n\nthe dog"]


def test_an_apostrophe_belongs_to_its_word() -> None:
    assert shared("I don't know him", "i don’t know her") == ["I don't know"]


def test_the_longest_match_is_taken_and_nothing_inside_it() -> None:
    assert shared("a b c d e", "a b c x a b c d y") == ["a b c d"]


def test_overlapping_spans_are_each_exact_and_one_mark_when_covered() -> None:
    text = "a b c d"
    spans = shared_spans(text, "a b c | b c d")
    assert spans == [Span(0, 5), Span(2, 7)]
    assert covered(spans) == [Span(0, 7)]


def test_ideographs_count_one_by_one() -> None:
    assert shared("我们喜欢小狗", "他喜欢小猫") == ["喜欢小"]


def test_texts_without_words_share_nothing() -> None:
    assert shared_spans("", "a b c") == []
    assert shared_spans("...", "...") == []


def test_a_span_of_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="min_words is 0"):
        shared_spans("a", "a", min_words=0)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=24).map(" ".join)


@given(WORDS, WORDS)
def test_every_run_of_three_shared_words_is_found_and_nothing_else(text: str, other: str) -> None:
    def trigrams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}

    spans = shared_spans(text, other)
    assert all(f" {text[start:stop]} " in f" {other} " for start, stop in spans)
    places = [found.span() for found in re.finditer(r"\w", text)]
    known = trigrams(other.split())
    for at in range(len(places) - 2):
        inside = any(s.start <= places[at][0] and places[at + 2][1] <= s.stop for s in spans)
        assert inside == (tuple(text.split()[at : at + 3]) in known)
