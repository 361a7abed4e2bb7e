"""A budget of tokens that nobody had to choose: within memory, enough, and kept for a resume."""

import json

import pytest

from benchmarks.models import Shape, build
from influence.layers import find_layers
from tasks import budget, store
from tasks.attributed import BUDGET, PassReference
from tasks.budget import ENOUGH, Budget, find_budget, remembered
from tests.influence import models
from tests.small_run import SECTIONS, stage_context
from tests.test_curvature_stages import make, scores


def found(monkeypatch: pytest.MonkeyPatch, free: int, length: int = 6, workers: int = 1) -> Budget:
    model = models.gpt2()

    class Memory:
        available = free

    monkeypatch.setattr(budget.psutil, "virtual_memory", Memory)
    return find_budget(model, models.attributed(model), length, "cpu", workers)


def test_much_memory_gives_what_is_enough_and_no_more(monkeypatch):
    assert found(monkeypatch, 2**50).tokens == ENOUGH["cpu"]


def test_little_memory_gives_few_tokens_a_power_of_two_and_at_least_a_sequence(monkeypatch):
    each = found(monkeypatch, 2**50).bytes_per_token
    assert found(monkeypatch, 2 * 300 * each).tokens == 256
    assert found(monkeypatch, 2 * 300 * each, workers=2).tokens == 128
    assert found(monkeypatch, 1).tokens == 6


def test_a_wider_model_holds_more_a_token():
    def held(width: int) -> int:
        model = build(Shape(2, width, 2, 64))
        layers, _ = find_layers(model, ("mlp",))
        return find_budget(model, layers, 64, "cpu", 1).bytes_per_token

    # The logits, which no width changes, are most of it: the growth is what is twice as large.
    assert held(512) - held(256) == pytest.approx(2 * (held(256) - held(128)), rel=0.1)


def test_weights_are_not_counted_as_held():
    """They are kept for the backward too, but of every batch they are the same."""
    model = build(Shape(1, 128, 2, 512))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    layers, _ = find_layers(model, ("mlp",))
    assert 2 * find_budget(model, layers, 2, "cpu", 1).bytes_per_token < weights / 4


def test_what_was_found_is_kept_and_not_found_again(tmp_path, capsys):
    file = tmp_path / BUDGET
    assert remembered(file, lambda: Budget(512, 2**20, 2**31)) == 512
    assert "batches of 512 tokens: a pass holds 1 MiB a token, and 2 GiB are free" in (
        capsys.readouterr().out
    )

    def never() -> Budget:
        raise AssertionError

    assert remembered(file, never) == 512
    assert json.loads(file.read_text())["bytes_per_token"] == 2**20


def test_stages_take_the_budget_and_score_as_with_any_other(tmp_path, monkeypatch):
    monkeypatch.setitem(ENOUGH, "cpu", 128)
    auto = {"runtime": SECTIONS["runtime"] | {"dtype": "float64", "tokens_per_batch": "auto"}}
    given = {"runtime": SECTIONS["runtime"] | {"dtype": "float64"}}
    for name in ("auto", "given"):
        (tmp_path / name).mkdir()
    one = scores(make(tmp_path / "auto", **auto))
    other = scores(make(tmp_path / "given", **given))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value == pytest.approx(other[key], rel=1e-9, abs=1e-12)
    context = stage_context(tmp_path / "auto", "stream", **auto)
    assert PassReference.of(context).tokens_per_batch == 128
    assert store.read_json(context.work / BUDGET)["tokens"] == 128
