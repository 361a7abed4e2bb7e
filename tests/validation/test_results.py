"""The tables are what the committed outcomes say, and thresholds are judged by them alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.validation import labels, results, settings, thresholds
from tests.validation.outcomes import correlation, failure, outcome, points, truth

TEXT = f"before\n\n{results.OPEN}\nold\n{results.CLOSE}\n\nafter\n"


def as_json(name: str = "concrete", **changes: Any) -> dict[str, Any]:
    """As it is read back from a file."""
    return json.loads(json.dumps(outcome(name, **changes).as_json()))


def verdicts(*outcomes: dict[str, Any]) -> dict[str, str]:
    return {row.asked: row.verdict for row in thresholds.judge(outcomes)}


def verdict(words: str, *outcomes: dict[str, Any]) -> str:
    [found] = [told for asked, told in verdicts(*outcomes).items() if words in asked]
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two files with a hand-written part, and two outcomes."""
    (tmp_path / results.RESULTS).mkdir(parents=True)
    for path in (results.PAGE, results.README):
        (tmp_path / path).write_text(TEXT)
    for name in ("concrete", "quick"):
        file = tmp_path / results.RESULTS / f"{name}.json"
        file.write_text(json.dumps(as_json(name)))
    return tmp_path


def test_this_checkout_says_what_its_benchmarks_found(root: Path):
    assert results.check(root) == []


def test_every_method_has_a_label():
    assert set(labels.METHODS) == set(settings.METHODS)


def test_what_is_written_stands_between_the_markers_and_is_written_once(checkout):
    assert len(results.check(checkout)) == 2
    assert set(results.write(checkout)) == {checkout / results.PAGE, checkout / results.README}
    assert results.check(checkout) == []
    times = [(checkout / path).stat().st_mtime_ns for path in (results.PAGE, results.README)]
    assert results.write(checkout) == []
    assert times == [
        (checkout / path).stat().st_mtime_ns for path in (results.PAGE, results.README)
    ]
    page = (checkout / results.PAGE).read_text()
    assert page.startswith(f"before\n\n{results.OPEN}\n### What was asked for")
    assert page.endswith(f"{results.CLOSE}\n\nafter\n")
    assert "\nold\n" not in page


def test_reports_find_the_agreement_of_all_benchmarks_but_quick_and_of_no_failed_one(checkout):
    file = checkout / results.CARD
    file.parent.mkdir(parents=True)
    file.write_text("[]\n")
    lost = as_json("energy")
    lost["methods"]["ekfac"]["truth"] = None
    (checkout / results.RESULTS / "energy.json").write_text(json.dumps(lost))
    assert results.CARD.name in " ".join(results.check(checkout))
    results.write(checkout)
    assert results.check(checkout) == []
    [told] = json.loads(file.read_text())
    assert told["benchmark"] == "concrete"
    assert told["ekfac"]["pearson"] == 0.91
    assert told["gradient_dot"]["pearson"] == 0.58


def test_a_number_changed_by_hand_is_seen(checkout):
    results.write(checkout)
    readme = checkout / results.README
    readme.write_text(readme.read_text().replace("0.910", "0.990"))
    [told] = results.check(checkout)
    assert told.startswith("README.md is not what docs/results says")


def test_a_file_without_markers_is_an_error_and_one_that_is_not_there_is_not(checkout):
    (checkout / results.README).unlink()
    results.write(checkout)
    (checkout / results.PAGE).write_text("no markers")
    assert "must hold <!-- benchmarks -->" in results.check(checkout)[0]
    with pytest.raises(ValueError, match="must hold"):
        results.write(checkout)
    assert (checkout / results.PAGE).read_text() == "no markers"


def test_without_outcomes_nothing_is_claimed(checkout):
    shutil.rmtree(checkout / results.RESULTS)
    results.write(checkout)
    for path in (results.PAGE, results.README):
        assert results.NOTHING in (checkout / path).read_text()


def test_the_readme_has_no_quick_benchmark(checkout):
    results.write(checkout)
    assert "quick" not in (checkout / results.README).read_text()
    assert "### quick" in (checkout / results.PAGE).read_text()


def test_a_row_says_what_the_outcome_says():
    page = results.render([as_json()])
    assert (
        "| EK-FAC | 0.910 [0.900, 0.915] | 0.890, 0.910, 0.912 | 0.890 | 0.911 [0.901, 0.916] "
        "| +0.330 [+0.300, +0.360] | 2.6 | 0.002 |"
    ) in page
    assert "Pearson with the PBRF [95 %] (30 queries, 3 seeds)" in page
    assert "| 1/N | 0.984 [0.970, 0.992] | 9.00 % | 100.0 % | 8.7e-09 | 212 | 5 min |" in page
    assert "| *ceiling* (two halves of the trainings) | 0.780" in page
    assert "EK-FAC 71 % in the top 10 %, 93 % in the top 20 %" in page


def test_every_table_has_as_many_cells_in_each_row():
    page = results.render([as_json(methods=outcome().methods | {"lissa": failure()})])
    tables = page.replace("\\|", "").split("\n\n")
    for table in (part.split("\n") for part in tables if part.startswith("|")):
        assert len({row.count("|") for row in table}) == 1, table[0]


def test_a_failure_is_reported_as_one():
    failed = as_json(methods=outcome().methods | {"lissa": failure()})
    told = "**failed**: diverged at iteration 37: the largest eigenvalue is 412, the step 0.01 \\|"
    assert f"| LiSSA | {told}" in results.render([failed])
    assert told in results.readme_block([failed])


@pytest.mark.parametrize(("value", "told"), [(1.0, "1.000"), (0.9999, "0.99990"), (-0.1, "-0.100")])
def test_a_correlation_near_one_keeps_its_distance(value, told):
    assert results._number(value) == told


# --- thresholds ---------------------------------------------------------------------------------

ALL = ("concrete", "energy", "digits", "mnist", "fashion", "tinylm")


def with_method(name: str, **changes: Any) -> dict[str, Any]:
    methods = outcome().methods
    return {"methods": methods | {name: replace(methods[name], **changes)}}


def everything(**changes: Any) -> list[dict[str, Any]]:
    """All benchmarks; tinylm with a BM25 that has a number."""
    methods = outcome().methods | {"bm25": outcome().methods["cosine"]}
    return [as_json(name, **{"methods": methods, "seconds": 300.0, **changes}) for name in ALL]


def test_all_thresholds_can_be_met():
    assert set(verdicts(*everything()).values()) == {"met"}


def test_what_has_not_run_leaves_a_threshold_open():
    assert set(verdicts().values()) == {"open"}
    assert verdict("EK-FAC with the PBRF", as_json("concrete")) == "open"
    assert verdict("EK-FAC with the PBRF", as_json("quick")) == "open"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("at ε = 0.1/N", {"truth": (truth(0.1, 0.989, 0.0), truth(1.0, 0.99, 0.0))}),
        ("at ε = 0.1/N", {"truth": ()}),
        ("at ε = 1/N", {"truth": (truth(0.1, 0.999, 0.0), truth(1.0, 0.949, 0.0))}),
        ("halving", {"truth": (truth(0.05, 0.999, 0.0), truth(0.1, 0.999, 0.051))}),
        ("EK-FAC with the PBRF", with_method("ekfac", truth=correlation(0.79))),
        ("EK-FAC with the PBRF", {"methods": outcome().methods | {"ekfac": failure()}}),
        ("paired interval", with_method("ekfac", above_dot=(0.2, -0.01, 0.4))),
        ("paired interval", with_method("ekfac", above_dot=(0.09, 0.05, 0.12))),
        ("LiSSA at its deepest", with_method("ekfac", truth=correlation(0.87))),
        ("on text: Pearson", with_method("ekfac", truth=correlation(0.59))),
        ("and BM25", {}),
        ("and BM25", with_method("cosine", truth=correlation(0.95))),
        ("ASTRA of", {"astra": points("astra", {200: 0.96, 400: 0.99})}),
        ("faster than LiSSA", with_method("ekfac", fit_seconds=10.0)),
        ("each further query", with_method("ekfac", query_seconds=0.1)),
        ("rank 32", {"ranks": points("ekfac", {32: 0.98})}),
        ("datamodeling", {"retrained": None}),
        ("mislabelled", {"mislabelled": None}),
        ("60 min", {"seconds": 3700.0}),
    ],
)
def test_a_threshold_can_be_missed(words, changes):
    name = {"and BM25": "tinylm", "rank 32": "mnist"}.get(words, "digits")
    name = "tinylm" if any(w in words for w in ("text", "faster", "further")) else name
    assert verdict(words, as_json(name, **changes)) == "missed"
    [bold] = [line for line in results.render([as_json(name, **changes)]).split("\n")
              if line.startswith("| ") and words in line and "missed" in line]  # fmt: skip
    assert "**missed**" in bold


def test_the_order_may_be_broken_on_some_benchmarks_and_level_on_all():
    worse = as_json("tinylm", **with_method("kfac", truth=correlation(0.6)))
    assert "K-FAC below diagonal Fisher" in results.render([worse])
    three = [as_json(name) for name in ALL[:3]]
    assert verdict("3 benchmarks", *three, worse) == "met"
    assert verdict("3 benchmarks", *three[:2], worse) == "open"
    level = replace(correlation(0.90), low=0.80)
    assert "EK-FAC level with K-FAC" in results.render(
        [as_json(**with_method("ekfac", truth=replace(level, pearson=0.85)))]
    )


def test_lissa_of_equal_agreement_lies_between_two_depths():
    from tasks.validation.rules import equal_agreement

    seconds, told = equal_agreement(as_json())
    assert told == "between depths 160 and 640"
    assert 0.0127 * 160 < seconds < 0.0127 * 640
    seconds, told = equal_agreement(as_json(lissa=points("lissa", {10: 0.6, 40: 0.7, 80: None})))
    assert (told, seconds) == ("depth 40, which agrees less", pytest.approx(0.4))
    assert equal_agreement(as_json(lissa=())) is None
