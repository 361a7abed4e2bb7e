"""The engine's benchmark measures what it says, and the page shows what was measured."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import clock, engine, forms, growth, models, phases, scale, table
from benchmarks.phases import PHASES, Setting, ours, unit
from influence.objectives import training_loss
from influence.sequences import TokenBatch
from influence.streaming import stream
from tests.conftest import ROOT

SMALL = ["--model", "S", "--length", "12", "--sequences", "2", "--queries", "2", "--repeats", "2"]


def test_every_phase_prints_a_line_with_its_ratio(capsys):
    names = ["factors", "lambda", "self", "query", "stream 8", "tokens 8"]
    engine.main([*SMALL, *(part for name in names for part in ("--phase", name))])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["phase"] for line in lines] == names
    for line in lines:
        assert 0 < line["fb_low"] <= line["fb"] <= line["fb_high"]
        assert (line["model"], line["length"], line["repeats"]) == ("S", 12, 2)


def test_memory_alone_takes_no_times(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "_memory", lambda given, name: asked.append(name) or 7.0)
    these = ["--phase", "tokens 8", "--phase", "stream 8"]
    engine.main([*SMALL, "--repeats", "0", "--memory", "--peer", "kronfluence", *these])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    # The peer has no token scores.
    assert asked == ["tokens 8", "stream 8", "peer: kronfluence: stream 8"]
    assert (first["peak_mib"], "peer_peak_mib" in first, "fb" in first) == (7.0, False, False)
    assert (second["peak_mib"], second["peer_peak_mib"]) == (7.0, 7.0)
    with pytest.raises(SystemExit):
        engine.main([*SMALL, "--repeats", "0"])


@pytest.fixture
def spend(monkeypatch):
    """A clock that only moves when it is told to: a busy machine must not decide a test."""
    now = [0.0]
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(time, name, lambda: now[0])

    def call(seconds: float) -> None:
        now[0] += seconds

    return call


def test_a_ratio_is_the_cost_of_a_token_over_that_of_the_unit(spend):
    unit_of = clock.Work(lambda: spend(0.5), num_tokens=10)
    works = {"twice": clock.Work(lambda: spend(0.5), 5), "free": clock.Work(lambda: None, 10)}
    found = clock.ratios(unit_of, works, repeats=3)
    assert found["twice"].repeats == pytest.approx((2, 2, 2))
    assert found["free"].repeats == (0, 0, 0)


def test_a_machine_that_slows_down_is_judged_by_the_units_on_both_sides(spend):
    costs = iter([1.0, 3.0])
    unit_of = clock.Work(lambda: spend(next(costs)), num_tokens=1)
    works = {"between": clock.Work(lambda: spend(2.0), 1)}
    assert clock.ratios(unit_of, works, 1, warm_up=False)["between"].median == pytest.approx(1)


@pytest.mark.parametrize("threads", [1, 2])
def test_of_one_thread_the_time_that_others_take_does_not_count(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = clock.seconds(lambda: time.sleep(0.2))
    finally:
        torch.set_num_threads(before)
    assert (taken > 0.19) == (threads > 1 or torch.cuda.is_available())


PEAK = """
import torch
from benchmarks import clock

def hold():
    parts = [torch.ones(2**23) for _ in range(4)]  # 128 MiB together
    del parts
    torch.ones(2**22)

print(clock.peak_mib(hold))
"""


def test_the_peak_is_what_a_call_holds_at_once(root):
    # In a process of its own, as `peak_mib` asks: here earlier tests' memory may not be given back.
    told = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True
    )
    assert float(told.stdout) == pytest.approx(128, abs=10)


def test_the_unit_is_a_training_step_with_all_weight_gradients():
    setting = Setting(models.SHAPES["S"], 12, 2)
    seen = {}
    original = setting.model.zero_grad

    def watched(set_to_none: bool = True) -> None:
        seen.update({n: p.grad is not None for n, p in setting.model.named_parameters()})
        original(set_to_none=set_to_none)

    setting.model.zero_grad = watched
    unit(setting).call()
    assert seen
    assert all(seen.values())


def test_the_unit_goes_through_a_part_of_a_large_corpus(monkeypatch):
    setting = Setting(models.SHAPES["S"], 12, 6, tokens_per_batch=24)
    assert unit(setting).num_tokens == 72
    monkeypatch.setattr(phases, "UNIT_TOKENS", 50)
    part = unit(setting)
    assert part.num_tokens == 48
    passed = []
    setting.model.register_forward_pre_hook(lambda _, args: passed.append(args[0].numel()))
    part.call()
    assert passed == [24, 24]


def test_how_much_may_wait_for_many_queries_is_passed_on_and_told(capsys, monkeypatch):
    given = []

    def watched(model, layers, prepared, batches, memory):
        given.append(memory)
        return stream(model, layers, prepared, batches, memory)

    monkeypatch.setattr(phases, "stream", watched)
    for more in ([], ["--waiting", "3"]):
        engine.main([*SMALL, "--phase", "stream 8", "--phase", "stream 64", *more])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert set(given) == {2 * 2**30, 3 * 2**30}
    assert [line.get("waiting_gib") for line in lines] == [None, None, None, 3]
    told = table.TOLD["stream 64"] + ", 3 GiB of gradients waiting"
    assert table._phase(lines[-1], repeats=2) == told
    assert table._phase(lines[-1], repeats=5) == told + "; 2 repeats"


def test_a_peak_is_the_middle_one_of_processes_that_are_given_the_same_setting(monkeypatch, capsys):
    commands, peaks = [], iter([9.0, 2.0, 5.0])

    def ran(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"peak_mib": next(peaks)}))

    monkeypatch.setattr(subprocess, "run", ran)
    given = [*SMALL, "--repeats", "0", "--memory", "--phase", "stream 64", "--waiting", "3"]
    engine.main(given)
    [line] = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert line["peak_mib"] == 5.0
    for command in commands:
        assert command[command.index("--waiting") + 1] == "3"
        assert command[command.index("--sequences") + 1] == "2"


def test_the_loss_of_the_unit_and_the_peers_is_that_of_our_passes():
    tokens = models.sequences(3, 6, seed=0)
    supervised = torch.ones(3, 6, dtype=torch.bool)
    supervised[:, 0] = supervised[1, 2:4] = False
    batch = TokenBatch(tokens.ids, tokens.tokens, supervised)
    logits = torch.randn(3, 6, models.VOCABULARY, dtype=torch.float64)
    wanted = training_loss(logits, batch)
    torch.testing.assert_close(models.torchs_loss(logits, batch, batch.targets), wanted)


def test_models_are_the_same_every_time_and_of_the_stated_size():
    sizes = {
        name: sum(p.numel() for p in models.build(models.SHAPES[name]).parameters())
        for name in ("S", "M")
    }
    assert sizes["M"] == pytest.approx(29.4e6, rel=0.05)
    one, two = (next(models.build(models.SHAPES["S"]).parameters()) for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="none of S, M, L"):
        models.shape_of("XL")


@pytest.mark.parametrize("name", models.NAMES)
def test_every_model_runs_every_kind_of_layer(name):
    setting = Setting(models.SHAPES[name], 6, 1, ("mlp", "attention"), num_queries=1)
    [work] = ours(setting, ["stream 8"]).values()
    assert work.call().shape == (8, 1, len(setting.layers))
    # q, k, v of the Llama share what goes in, and so do gate and up.
    groups = len({layer.input_group for layer in setting.layers})
    assert len(setting.layers) - groups == (24 if name == "L" else 0)


def test_zipf_tokens_are_mostly_common():
    tokens = models.sequences(4, 500, seed=1).tokens
    assert (tokens < 100).float().mean() > 0.4
    assert tokens.max() > 4000


def line(phase: str, fb: float, **more: float) -> dict[str, object]:
    about = {"model": "M", "length": 512, "layers": ["mlp"], "machine": "a machine", "sequences": 8}
    spread = {"fb": fb, "fb_low": fb - 0.01, "fb_high": fb + 0.02}
    return about | {"threads": 1, "repeats": 5, "phase": phase} | spread | more


@pytest.mark.parametrize("phase", [pytest.param("factors", marks=pytest.mark.doors), "stream 8"])
def test_ten_times_the_corpus_takes_no_more_memory(phase):
    """Less than a twentieth more at the peak, in a process each; batches are as large in both.

    An allocator that keeps what was given back would be measured too: here it gives it back.
    """

    def peak(sequences: int) -> float:
        command = [sys.executable, "-m", "benchmarks.engine", "--memory-of", phase]
        sizes = ["--model", "S", "--length", "128", "--sequences", str(sequences)]
        sizes += ["--batch", "128"]
        given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        told = subprocess.run(
            [*command, *sizes], check=True, capture_output=True, text=True, env=given_back
        )
        return json.loads(told.stdout.splitlines()[-1])["peak_mib"]

    few, many = peak(20), peak(200)  # so many batches
    assert few > 10
    assert many < 1.05 * few


@pytest.mark.parametrize("decision", forms.DECISIONS)
def test_the_form_that_is_chosen_is_the_cheapest_in_nine_shapes_of_ten(decision):
    """As measured here and now; near ties may fall either way."""
    overs = [forms.measured(decision, shape)["over"] for shape in forms.GRID]
    assert sum(over <= 1.25 for over in overs) >= 9, overs


@pytest.mark.parametrize("decision", forms.DECISIONS)
def test_all_forms_of_a_decision_are_one_number(decision):
    for shape in (forms.Shape(5, 3, 4, 2, 2), forms.Shape(3, 6, 2, 5, 1)):
        _, ways = forms.DECISIONS[decision](shape)
        one, *others = (form() for form in ways.values())
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_an_exponent_is_the_slope_between_size_and_cost():
    assert scale.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_an_axis_is_measured_at_each_of_its_sizes(spend):
    def points():
        for size in (1, 4):
            yield size, clock.Work(lambda size=size: spend(0.5 * size), 1)

    found = scale.measured(scale.Axis("sleep", "sleeping", points), repeats=3)
    assert found["sizes"] == [1, 4]
    assert found["seconds"] == pytest.approx([0.5, 2.0])
    assert found["exponent"] == pytest.approx(1)


def test_the_axes_vary_what_they_say():
    lengths = [size for axis in scale.axes()[:1] for size, _ in axis.points()]
    assert lengths == [64, 128, 256, 512]
    names = {axis.name for axis in scale.axes()}
    assert names == {"tokens", "width", "queries", "rank"}


def test_what_is_kept_is_what_the_table_says(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("before\n<!-- engine --><!-- /engine -->\nafter")
    peers = {"peer_fb": 1.5, "peer_fb_low": 1.4, "peer_fb_high": 1.6}
    ratio = {"over_peer": 0.5, "over_peer_low": 0.45, "over_peer_high": 0.55}
    first = line("lambda", 1.23, **peers, **ratio, peak_mib=100.0, peer_peak_mib=1200.0)
    agreement = {key: value for key, value in first.items() if "fb" not in key} | {
        "agreement": {"A": 6.6e-8}
    }
    del agreement["phase"]
    table.keep(tmp_path, [line("self", 3.0) | {"machine": "another"}])
    table.keep(tmp_path, [line("lambda", 9.9)])
    table.keep(tmp_path, [line("stream 8", 0.7)])  # and what was measured of others stays
    table.keep(tmp_path, [first, agreement])  # the same phase again is replaced
    table.keep(tmp_path, [line("stream 8", 0.6) | {"sequences": 64}])  # over more is a line more
    memory = {k: v for k, v in first.items() if "fb" not in k and "peer" not in k}
    table.keep(tmp_path, [memory | {"peak_mib": 200.0}])  # but not what was not measured again
    [lines] = table.read(tmp_path).values()
    assert [told.get("phase") for told in lines] == ["lambda", "stream 8", "stream 8", None]
    table.write(tmp_path)
    text = (tmp_path / "docs/results.md").read_text()
    assert text.startswith("before\n<!-- engine -->")
    assert text.endswith("<!-- /engine -->\nafter")
    assert (
        "| Λ | 8 | 1.23 [1.22, 1.25] | 1.50 [1.40, 1.60] | 0.50 [0.45, 0.55] | 200 against 1,200 |"
        in text
    )
    assert "| stream, 8 queries of rank 32 | 8 | 0.70 [0.69, 0.72] | – | – | – |" in text
    assert "| stream, 8 queries of rank 32 | 64 | 0.60 [0.59, 0.62] | – | – | – |" in text
    assert "A 7e-08" in text
    assert (tmp_path / table.FIGURE).stat().st_size > 1000


def test_the_committed_page_is_what_was_measured():
    text = (ROOT / table.PAGE).read_text("utf-8")
    assert table.with_block(text, table.block(ROOT)) == text


def test_what_is_measured_without_onednn_is_kept_apart(tmp_path):
    about = {"model": "M", "length": 512, "layers": ["mlp"], "machine": "a machine", "sequences": 8}
    line = about | {"phase": "lambda", "fb": 1.2}
    table.keep(tmp_path, [line])
    table.keep(tmp_path, [line | {"without_onednn": True, "fb": 1.5}])
    found = {name: [each["fb"] for each in lines] for name, lines in table.read(tmp_path).items()}
    assert found == {"M-512-mlp": [1.2], "M-512-mlp-without-onednn": [1.5]}


def test_growth_is_kept_told_and_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("<!-- engine --><!-- /engine -->")
    axis = {"axis": "rank", "phase": "stream", "sizes": [8, 1024], "seconds": [0.5, 2.0]}
    told = axis | {"exponent": 0.2857}
    monkeypatch.setattr(scale, "axes", lambda: ["the one"])
    monkeypatch.setattr(scale, "measured", {"the one": told}.get)
    monkeypatch.setattr(scale, "workers", lambda setting, num: 0.9 * num)
    scale.main(tmp_path)
    scale.main(tmp_path)  # in the place of the first
    lines = growth.read(tmp_path / table.FOLDER)
    assert [line["axis"] for line in lines] == ["rank", "workers"]
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert table.read(tmp_path) == {}  # no setting's phases
    text = (tmp_path / "docs/results.md").read_text()
    assert "| rank of the queries | stream | 8, 1,024 | 0.50, 2.00 | 0.29 |" in text
    assert "do 1.80 times what one does" in text
    assert (tmp_path / table.FOLDER / "growth.png").stat().st_size > 1000


def test_workers_are_timed_on_the_wall_where_they_run_side_by_side(monkeypatch):
    """By the time of the process two that work at once would take as long as one after another."""
    works = clock.Work(lambda: time.sleep(0.1), 1)
    monkeypatch.setattr(scale, "stream_work", lambda *_: works)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert 1.5 < scale.workers(phases.Setting(), 2, repeats=3) < 2.1
    finally:
        torch.set_num_threads(before)


def test_every_phase_has_words():
    assert set(table.TOLD) == set(PHASES)
