"""A plan: its figures against what a small run writes, what it refuses, and what would mend it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from flows import planning
from tasks import store
from tasks.models import load_tokenizer
from tasks.params import RunParams
from tasks.planning import estimate, measured, plan, probe
from tasks.planning.corpus import corpus_size, sampled_size
from tasks.planning.estimate import run_sizes
from tasks.planning.fitcosts import HEADER
from tasks.planning.hardware import Hardware, described
from tasks.planning.measured import Measured, measured_stages, record_stage
from tasks.planning.model import model_sizes
from tasks.planning.plan import plan_run
from tasks.planning.planned import Planned, Sizes, StageCost
from tasks.planning.probe import probe_rates
from tasks.planning.rates import of_start
from tasks.planning.remedies import changed, fullest, lacks, refusal, smallest_change
from tasks.planning.stages import stage_costs
from tasks.planning.table import compared_rows, markdown
from tests.small_run import MODEL, SECTIONS, stage_context
from tests.test_curvature_stages import make

ROOMY = Hardware(None, 2**50, 2**50, None, None, None, 1, "roomy")
STARTED = {
    "seconds": 3.0, "bare_bytes": 3e8, "bytes": 4e8, "checks_seconds": 1.0, "checks_bytes": 1e8,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    make(folder)
    store.write_text(folder / "params/small.yaml", json.dumps(SECTIONS))
    store.write_text(folder / "params/active.yaml", "fits: {}\nruns: {}\nbenchmarks: {}\n")
    return folder


@pytest.fixture(scope="module")
def planned(root) -> Planned:
    params = RunParams.model_validate(SECTIONS)
    sizes, _ = run_sizes(root, params, root / "artifacts/small")
    return Planned(params, sizes, ROOMY)


@pytest.fixture
def unprobed(monkeypatch) -> None:
    def refuse(*_: object) -> dict[str, float]:
        raise ValueError("no probe here")

    monkeypatch.setattr(estimate, "startup", refuse)


def costs_of(planned: Planned) -> dict[str, StageCost]:
    return {each.stage: each for each in stage_costs(planned)}


def llama70b(folder: Path, **sections: Any) -> RunParams:
    LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    train = {"checkpoint": {"path": str(folder)}}
    return RunParams.model_validate(SECTIONS | {"train": train} | sections)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("factors", "factors.safetensors"),
        ("eigen", "eigen.safetensors"),
        ("correct", "spectrum.safetensors"),
        ("query", "prepared.safetensors"),
    ],
)
def test_files_are_as_large_as_planned(root, planned, stage, file):
    written = (root / "artifacts/small" / stage / file).stat().st_size
    told = {"factors": 500 * len(planned.layers), "query": 700 * 2}.get(stage, 0)  # JSON beside it
    assert costs_of(planned)[stage].disk - told == pytest.approx(written, rel=0.01)


def test_scores_and_tokens_are_as_large_as_planned(root, planned):
    def size(stage: str, pattern: str) -> int:
        files = (root / "artifacts/small" / stage).glob(pattern)
        return sum(file.stat().st_size for file in files)

    rows = store.read_table(root / "artifacts/small/filter/candidates.parquet").num_rows
    headers = costs_of(planned)["stream"].shards * 3 * HEADER
    told = (costs_of(planned)["stream"].disk - headers) * rows / planned.num_candidates
    files = (root / "artifacts/small/stream").glob("*.safetensors")
    tensors = [each for file in files for each in store.read_tensors(file).values()]
    assert told == sum(each.nbytes for each in tensors)
    assert planned.num_candidates == pytest.approx(rows, abs=2)
    tokens = 5 * planned.sizes.corpus.num_tokens
    assert tokens == pytest.approx(size("tokenize", "*.safetensors"), rel=0.15)  # a header of 300 B


def test_a_tokenised_corpus_is_counted_and_another_is_told_from_a_sample(root):
    params = RunParams.model_validate(SECTIONS)
    folder = root / "artifacts/small/tokenize"
    exact = corpus_size(params, root, folder, None)
    assert (exact.exact, exact.told) == (True, "as tokenised")
    sampled = sampled_size(params, root, load_tokenizer(MODEL))
    assert not sampled.exact
    assert "estimated from 8 documents" in sampled.told
    assert (sampled.num_documents, sampled.num_tokens) == (8, exact.num_tokens)
    assert sampled.num_sequences == exact.num_sequences
    other = params.model_copy(
        update={"tokenize": params.tokenize.model_copy(update={"context": 32})}
    )
    assert not corpus_size(other, root, folder, None).exact


def test_a_model_of_70_billion_is_sized_and_refused(tmp_path, root):
    params = llama70b(tmp_path / "model")
    model = model_sizes(params, root, tmp_path / "none", 64)
    assert model.shape.num_parameters == 70_553_706_496
    assert len(model.shape.layers) == 240
    assert len({each.input_group for each in model.shape.layers}) == 160  # gate and up share
    sizes = Sizes(model, corpus_size(params, root, tmp_path, None), 2, 20, 0, 0)
    here = described("tflops=400,memory=80GiB,host_memory=1TiB,disk=10TiB", ROOMY)
    told, blocked = refusal(Planned(params, sizes, here), tmp_path, "small", "small")
    assert "device memory, and 80 GiB are free" in " ".join(told)
    assert "no setting makes it fit" in told[-1]
    assert blocked


def test_what_a_pass_holds_grows_as_autograd_says(planned, root):
    """Held bytes against those that a real pass's saved tensors take."""
    from tasks.attributed import PassReference
    from tasks.budget import find_budget

    context = stage_context(root, "factors")
    there = PassReference.of(context).attributed()
    found = find_budget(there.model, there.layers, 64, "cpu", 1).bytes_per_token
    # Told also for the lower half of the lowest block, which a pass does not go down to; without
    # what the loss keeps, which is told apart.
    assert 4 * planned.sizes.model.held == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ({"host_memory": 0.97}, "runtime.tokens_per_batch"),
        ({"disk": 0.9}, "runtime.shards"),
    ],
)
def test_the_change_that_is_told_makes_it_fit(tmp_path, planned, short, key):
    """Of a larger run, of which one thing is a little short."""
    params = planned.params
    runtime = params.runtime.model_copy(update={"tokens_per_batch": 65536, "shards": 50})
    query = params.query.model_copy(update={"rank": 1})
    large = replace(planned, params=params.model_copy(update={"runtime": runtime, "query": query}))
    needs = {
        "host_memory": max(each.host for each in stage_costs(large)),
        "disk": fullest(stage_costs(large))[1],
    }
    [what] = short
    tight = replace(large, hardware=replace(ROOMY, **{what: int(short[what] * needs[what])}))
    [lack] = lacks(tight)
    assert lack.need > lack.there
    change = smallest_change(tight)
    assert list(change) == [key]
    assert lacks(changed(tight, change)) == []
    told, blocked = refusal(tight, tmp_path, "small", "small")
    assert f"it would fit with {key}: {change[key]}" in told[-1]
    assert blocked == [lack.stage]


def test_several_settings_are_changed_where_one_does_not_suffice(planned):
    params = planned.params
    runtime = params.runtime.model_copy(update={"tokens_per_batch": 65536, "workers": 2})
    large = replace(planned, params=params.model_copy(update={"runtime": runtime}))
    least = {"runtime.tokens_per_batch": 64, "runtime.workers": 1}
    need = max(each.host for each in stage_costs(changed(large, least)))
    tight = replace(large, hardware=replace(ROOMY, host_memory=int(1.001 * need)))
    change = smallest_change(tight)
    assert len(change) > 1
    assert lacks(changed(tight, change)) == []


def test_a_run_that_fits_is_not_refused(tmp_path, planned):
    assert refusal(planned, tmp_path, "small", "small") == ([], [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tflops=400", "lacks memory"),
        ("memory=80GiB", "lacks tflops"),
        ("tflops=400,memory=80", "memory: given '80', wanted a size such as 80GiB"),
        ("tflops=fast,memory=80GiB", "tflops: given 'fast', wanted a number above 0"),
        ("tflops=4,memory=8GiB,devices=1.5", "devices: given '1.5', wanted a whole number"),
        ("tflops=4,memory=8GiB,cores=3", "given 'cores=3', wanted each of tflops"),
        ("tflops=4,tflops=5,memory=8GiB", "at most once"),
    ],
)
def test_hardware_that_is_not_told_as_it_should_be(text, named):
    with pytest.raises(ValueError, match="--hardware") as raised:
        described(text, ROOMY)
    assert named in str(raised.value)


def test_described_hardware_gives_time_by_arithmetic(root):
    one = "tflops=0.001,memory=80GiB,host_memory=64GiB,disk=1TiB,host_gflops=1"
    slow = plan_run(root, "small", "small", one)
    fast = plan_run(root, "small", "small", one.replace("0.001", "0.002"))
    for each, other in zip(slow.stages, fast.stages, strict=True):
        if each.stage in ("factors", "correct", "stream", "score", "query"):
            assert each.seconds == pytest.approx(2 * (other.seconds or 0))
    assert not (root / "plans").exists(), "the plan of another machine is not kept"


def test_a_model_over_the_devices_of_a_machine_has_their_memory_and_the_speed_of_one(root):
    """And no GPU need be here."""
    spread = SECTIONS | {"runtime": SECTIONS["runtime"] | {"device": "spread"}}
    store.write_text(root / "params/spread.yaml", json.dumps(spread))
    told = "tflops=0.001,memory={},host_memory=64GiB,disk=1TiB,host_gflops=1,devices={}"
    four = plan_run(root, "spread", "small", told.format("1MiB", 4))
    one = plan_run(root, "small", "small", told.format("4MiB", 1))
    assert four.stages == one.stages
    assert any("device memory, and 0.00391 GiB are free" in fault for fault in four.faults)


def test_a_plan_is_kept_until_what_it_follows_from_changes(root, unprobed, monkeypatch):
    first = plan_run(root, "small", "small")
    assert "no probe here" in first.told[-1]
    assert all(each.seconds is None for each in first.stages)
    monkeypatch.setattr(estimate, "estimated", None)
    assert plan_run(root, "small", "small") == first
    sections = SECTIONS | {"query": SECTIONS["query"] | {"rank": 2}}
    key = plan.plan_key(root, "small", "small", RunParams.model_validate(sections))
    assert key != first.key
    assert plan.fitting_plan(root, "small", key) is None


def test_a_kept_plan_is_made_anew_where_memory_has_shrunk(root, unprobed, monkeypatch):
    made = plan_run(root, "small", "small", anew=True)
    less = replace(ROOMY, host_memory=2**20)
    monkeypatch.setattr(plan, "this_machine", lambda *_: less)
    assert plan.fitting_plan(root, "small", made.key) is None


def test_rates_are_timed_on_the_runs_own_work(planned, monkeypatch):
    monkeypatch.setattr(probe, "ENOUGH", 0.0)
    rates = probe_rates(planned, "cpu", STARTED)
    assert rates.by_token is not None
    assert set(rates.by_token) == {"factors", "correct", "stream", "score"}
    assert min(rates.by_token.values()) > 0
    assert None not in (rates.fb, rates.by_query, rates.eigen, rates.flops)
    assert rates.base == of_start(STARTED).base == 400_000_000


def test_a_model_too_large_for_a_probe_is_not_tried(planned):
    tight = replace(planned, hardware=replace(ROOMY, host_memory=2**20))
    with pytest.raises(ValueError, match="too large for a probe"):
        probe_rates(tight, "cpu", STARTED)


def test_what_a_stage_took_stands_beside_what_was_planned(root, unprobed):
    context = stage_context(root, "factors")
    made = plan_run(root, "small", "small", anew=True)
    record_stage(context, whole=True)
    taken = measured_stages(root, "small", "small")
    folder = root / "artifacts/small/factors"
    assert taken["factors"].disk == sum(file.stat().st_size for file in folder.iterdir())
    assert taken["factors"].host > 2**26
    assert taken["factors"].seconds > 0
    [row] = compared_rows(made, taken)
    assert row[0] == "factors"
    assert float(row[-1]) == pytest.approx(1, abs=0.1)
    assert "Planned and taken" in markdown(made, taken)
    resumed = {"factors": replace(taken["factors"], whole=False)}
    assert compared_rows(made, resumed) == []  # it did a part of the work


def test_a_stage_that_resumes_is_known(root):
    context = stage_context(root, "eigen")
    assert not measured.has_partials(context)
    store.write_text(context.work / "shard-00000-of-00003.safetensors", "")
    assert measured.has_partials(context)


def test_a_pipeline_is_refused_only_for_stages_that_would_run(root, unprobed, monkeypatch):
    made = plan_run(root, "small", "small", anew=True)
    short = replace(
        made, faults=("stage stream needs more", "it would fit so"), blocked=("stream",)
    )
    monkeypatch.setattr(planning, "_planned", lambda *_: short)
    monkeypatch.setattr(planning.dvcstage, "pending", lambda *_: ["changed"])
    with pytest.raises(ValueError, match="stream needs more; it would fit so"):
        planning.plan_ahead(root, "small", "report")
    assert planning.plan_ahead(root, "small", "correct") is short
    monkeypatch.setattr(planning.dvcstage, "pending", lambda *_: [])
    assert planning.plan_ahead(root, "small", "report") is short


def test_a_pipeline_goes_on_without_a_plan_that_fails(root, monkeypatch, capsys):
    class Failed:
        returncode, stderr = 1, "flows: error: no model\n"

    monkeypatch.setattr(planning, "fitting_plan", lambda *_: None)
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: Failed)
    assert planning.plan_ahead(root, "small", "report") is None
    assert "no model" in capsys.readouterr().out
    monkeypatch.setenv(planning.SWITCH, "no")
    assert planning.plan_ahead(root, "small", "report") is None


def test_a_measurement_is_read_as_it_was_written(tmp_path):
    one = Measured(1.5, 2, 3, 4, True)
    file = measured.plan_folder(tmp_path, "fitted") / "factors.json"
    store.write_json(file, {"seconds": 1.5, "host": 2, "device": 3, "disk": 4, "whole": True})
    assert measured_stages(tmp_path, "run", "fitted") == {"factors": one}


def test_without_a_probe_what_is_not_known_stays_open_and_is_probed_when_asked(
    root, unprobed, monkeypatch
):
    rates = root / "plans/small/rates.json"
    rates.unlink(missing_ok=True)
    made = plan_run(root, "small", "small", anew=True, probe=False)
    assert all(each.seconds is None for each in made.stages)
    assert plan_run(root, "small", "small", probe=False) == made  # kept for the next pipeline

    def probed(*_: object) -> dict[str, float]:
        raise ValueError("a probe was tried")

    monkeypatch.setattr(estimate, "startup", probed)
    assert "a probe was tried" in " ".join(plan_run(root, "small", "small").told)


def test_a_conversation_and_a_completion_to_come_are_sized(root, tmp_path):
    queries = tmp_path / "queries.jsonl"
    said = [{"role": "user", "content": "Who? " * 20}, {"role": "assistant", "content": "Lily."}]
    lines = [
        {"name": "told", "messages": said},
        {"name": "to_come", "prompt": "A girl named", "generate": 4},
    ]
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = SECTIONS["query"] | {"path": str(queries)}
    sizes, _ = run_sizes(root, RunParams.model_validate(SECTIONS | {"query": asked}), root / "a")
    assert sizes.num_queries == 2
    assert 15 < sizes.query_length < 60
