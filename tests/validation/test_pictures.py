"""Figures: small, the same bytes each time, and of outcomes that lack something too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.validation import labels, pictures
from tasks.validation.outcome import Outcome
from tests.validation.outcomes import arrays, failure, outcome, points

LARGEST = 80_000
PNG = b"\x89PNG\r\n"
DRAWN: dict[str, Callable[[Outcome, Path], None]] = {
    "correlation": pictures.correlation,
    "against_time": pictures.against_time,
    "scatter": lambda _, path: pictures.scatter(*arrays(), path),
    "sweeps": pictures.sweeps,
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_small_and_of_the_same_bytes_each_time(name, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    for path in (first, second):
        DRAWN[name](outcome(), path)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(PNG)
    assert first.stat().st_size < LARGEST
    assert int.from_bytes(first.read_bytes()[16:20], "big") == 800  # pixels across


@pytest.mark.parametrize("name", ["correlation", "against_time", "sweeps"])
def test_what_failed_or_was_not_swept_is_drawn_too(name, tmp_path):
    all_failed = dict.fromkeys(outcome().methods, failure())
    bare = outcome(
        methods=all_failed, lissa=points("lissa", {10: None, 40: None}), astra=(),
        dampings=(), ranks=(), splits=(), fit_sizes=(),
    )  # fmt: skip
    DRAWN[name](bare, tmp_path / "bare.png")
    assert (tmp_path / "bare.png").read_bytes().startswith(PNG)


def test_another_number_is_another_figure(tmp_path):
    pictures.correlation(outcome(), tmp_path / "one.png")
    pictures.correlation(outcome(methods={"ekfac": failure()}), tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_a_query_without_any_effect_is_no_obstacle(tmp_path):
    estimates, truth = arrays()
    truth[0] = 0
    pictures.scatter({"ekfac": estimates["ekfac"]}, truth, tmp_path / "zero.png")
    assert (tmp_path / "zero.png").exists()


def test_the_slope_of_an_estimate_at_half_the_scale_is_a_half():
    _, truth = arrays()
    assert pictures._slope(truth / 2, truth) == pytest.approx(0.5)
    assert pictures._pearson(truth[0] / 2, truth[0]) == pytest.approx(1)
    assert np.isnan(pictures._pearson(truth[0], np.ones(500)))


def test_methods_that_are_drawn_are_methods():
    drawn = {*pictures.STYLES, *pictures.CURVES, *pictures.POINTS, *pictures.UNSCALED}
    assert drawn <= set(labels.METHODS)
