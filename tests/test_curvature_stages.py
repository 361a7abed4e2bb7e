"""Stages factors, eigen, correct, query, stream and score: against oracles, and what cannot matter.

One small run in float64 at full rank goes through the stages on the embedded model and real
stories, and its table of scores is compared with dense algebra on the same files.
"""

import gzip
import itertools
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from influence.layers import Layer
from influence.tokens import Rescored
from tasks import correct, eigen, factors, filter, query, score, store, stream, tokenize, train
from tasks.attributed import PassReference
from tasks.baselines import SCHEMA
from tasks.eigens import read_eigen
from tasks.fullrank import Told
from tasks.halves import split_half
from tasks.kronecker import read_factors
from tasks.layergroups import groups_of_layers, solved_bytes
from tasks.prepared import StoredSolvers
from tasks.spectra import read_spectra
from tests import oracles
from tests.devices import spread_over_two
from tests.small_run import ROOT, SECTIONS, run_stage, stage_context, write_lines

STAGES = {
    "train": train,
    "tokenize": tokenize,
    "filter": filter,
    "factors": factors,
    "eigen": eigen,
    "correct": correct,
    "query": query,
    "stream": stream,
    "score": score,
}
EXACT = {
    # The two smallest kinds of layers, 2048 weights each: their dense G fits a test.
    "layers": ["model.layers.4.self_attn.k_proj", "model.layers.3.self_attn.v_proj"],
    "query": SECTIONS["query"] | {"rank": None, "damping_grid": [2.0]},
    "stream": {"self_influence": True, "subspace": None},
    "runtime": SECTIONS["runtime"] | {"dtype": "float64"},
}


def stories(count: int) -> list[dict[str, str]]:
    with gzip.open(ROOT / "data/tinystories/first1000.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def make(root: Path, **sections) -> Path:
    write_lines(root / "corpus.jsonl", stories(8))
    queries = [
        {"name": "park", "prompt": "Lily went to the", "completion": " park to play."},
        {"name": "toy", "prompt": "Tom lost his", "completion": " toy car."},
    ]
    write_lines(root / "queries.jsonl", queries)
    for name, module in STAGES.items():
        run_stage(root, name, module, **sections)
    return root / "artifacts/small"


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("exact"), **EXACT)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("single"))


def scores(folder: Path) -> dict[tuple[str, str, int], float]:
    table = store.read_table(folder / "score/scores.parquet").to_pylist()
    return {(r["method"], r["query"], r["row"]): r["influence"] for r in table}


def test_every_score_is_the_dense_damped_solve(exact):
    """−∇fᵀ(G + λI)⁻¹∇L / N, with G = Q Λ Qᵀ dense and the gradients by plain autograd.

    At every λ of the grid, and of each candidate's own log-probability too.
    """
    root = exact.parent.parent
    context = stage_context(root, "score", **EXACT)
    model = PassReference.of(context).attributed().model.double().requires_grad_(True)
    tokens = store.read_tensors(exact / "tokenize/tokens.safetensors")
    queries = store.read_json(exact / "query/queries.json")
    spectra = read_spectra(exact / "correct/spectrum.safetensors")
    layers = {
        layer["name"]: layer for layer in store.read_json(exact / "factors/layers.json")["layers"]
    }
    found = scores(exact)
    modules = dict(model.named_modules())
    rows = sorted({row for _, _, row in found})
    own = {
        r["row"]: r["self_influence"]
        for r in store.read_table(exact / "score/self_influence.parquet").to_pylist()
    }
    assert sorted(own) == rows
    solved: dict[tuple[str, str], list[torch.Tensor]] = {}
    inverse: dict[str, tuple[torch.Tensor, float]] = {}
    for name, layer in layers.items():
        values = spectra[name].values
        G = oracles.ekfac(
            read_eigen(exact / "eigen", f"A/{layer['input_group']}").vectors,
            read_eigen(exact / "eigen", f"S/{name}").vectors,
            values,
        )
        damping = 0.1 * float(values.mean())
        inverse[name] = G, damping
        solved["ekfac", name], solved["ekfac@2", name] = [], []
        for q in queries:
            ids = torch.tensor(q["prompt_tokens"] + q["completion_tokens"])
            supervised = torch.arange(len(ids)) >= len(q["prompt_tokens"])
            f = oracles.log_probability(model, (ids, supervised))
            V = oracles.weight_gradient(f, modules[name])
            solved["ekfac", name].append(oracles.damped_solve(G, V, damping))
            solved["ekfac@2", name].append(oracles.damped_solve(G, V, 20 * damping))
    for row in rows[:4]:
        start, end = tokens["offsets"][row : row + 2].tolist()
        ids, supervised = tokens["tokens"][start:end].long(), tokens["supervised"][start:end].bool()
        loss = -oracles.log_probability(model, (ids, supervised))
        gradients = {name: oracles.weight_gradient(loss, modules[name]) for name in layers}
        N = len(tokens["offsets"]) - 1
        for (q, described), method in itertools.product(enumerate(queries), ("ekfac", "ekfac@2")):
            expected = -sum(
                float((solved[method, name][q] * gradients[name]).sum()) for name in layers
            )
            assert found[method, described["name"], row] == pytest.approx(expected / N, rel=1e-9)
        form = sum(
            float((oracles.damped_solve(inverse[name][0], g, inverse[name][1]) * g).sum())
            for name, g in gradients.items()
        )
        assert own[row] == pytest.approx(form / N, rel=1e-9)


def test_a_subspace_that_holds_all_queries_changes_no_score_and_says_what_it_loses(exact, tmp_path):
    for columns, loses in ((64, False), (1, True)):
        root = tmp_path / str(columns)
        root.mkdir()
        folder = make(root, **EXACT | {"stream": {"self_influence": False, "subspace": columns}})
        lost = store.read_json(folder / "stream/index.json")["subspace"]
        assert all((share > 0.01) == loses for share in lost.values())
        found, wanted = scores(folder), scores(exact)
        agree = all(value == pytest.approx(wanted[key], rel=1e-8) for key, value in found.items())
        assert agree != loses
    assert store.read_json(exact / "stream/index.json")["subspace"] is None


def test_the_top_table_adds_up_by_layer_and_by_token(exact):
    for row in store.read_table(exact / "score/top.parquet").to_pylist():
        grid = torch.tensor(row["layer_token_influence"], dtype=torch.float64)
        # float32 columns; a lost layer or token would be off by far more
        assert float(grid.sum()) == pytest.approx(row["influence"], rel=1e-5, abs=1e-9)
        assert sum(row["layers"]) == pytest.approx(row["influence"], rel=1e-5, abs=1e-9)
        assert sum(row["token_influence"]) == pytest.approx(row["influence"], rel=1e-5, abs=1e-9)
        assert len(row["tokens"]) == len(row["token_influence"]) == grid.shape[1]


def test_the_top_table_is_ordered_and_split_by_sign(single):
    rows = store.read_table(single / "score/top.parquet").to_pylist()
    assert {row["query"] for row in rows} == {"park", "toy"}
    for name in ("park", "toy"):
        up = [r["influence"] for r in rows if r["query"] == name and r["sign"] == "+"]
        down = [r["influence"] for r in rows if r["query"] == name and r["sign"] == "-"]
        assert up == sorted(up, reverse=True)
        assert all(score > 0 for score in up)
        assert down == sorted(down)
        assert all(score < 0 for score in down)
        assert up
        assert down


def test_a_full_rank_rescore_is_the_streamed_score_where_nothing_was_truncated(exact):
    found = scores(exact)
    for row in store.read_table(exact / "score/top.parquet").to_pylist():
        assert row["influence"] == pytest.approx(found["ekfac", row["query"], row["row"]], rel=1e-9)
        assert row["influence_low_rank"] == found["ekfac", row["query"], row["row"]]


def told_columns() -> dict[str, list[tuple[str, str]]]:
    """Columns and types by table, as docs/interchange.md has them."""
    told: dict[str, list[tuple[str, str]]] = {}
    section: list[tuple[str, str]] = []
    for line in (ROOT / "docs/interchange.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = told.setdefault(line.strip("# `"), [])
        elif line.startswith("| ") and not line.startswith("| column"):
            section.append((line.split(" | ")[0].strip("| "), line.split(" | ")[1]))
    return told


def test_every_table_has_the_columns_that_the_documentation_tells(exact):
    told = told_columns()
    written = sorted(exact.rglob("*.parquet"))
    assert {path.relative_to(exact).as_posix() for path in written} == {
        name for name in told if name.endswith(".parquet") and "validate/" not in name
    }
    for path in written:
        columns = [(f.name, str(f.type)) for f in store.read_table(path).schema]
        plain = [
            (name, kind.replace("element: ", "").replace("double", "float64"))
            for name, kind in columns
        ]
        plain = [(name, re.sub(r"\bfloat\b", "float32", kind)) for name, kind in plain]
        assert plain == told[path.relative_to(exact).as_posix()], path
    assert list(SCHEMA.items()) == told["validate/baselines.parquet"]


def test_tokens_of_the_top_table_join_into_the_text_of_the_story(single):
    texts = {story["id"]: story["text"] for story in stories(8)}
    for row in store.read_table(single / "score/top.parquet").to_pylist():
        [document] = row["documents"]
        assert "".join(row["tokens"]).removeprefix("<s>") in texts[document]


@pytest.mark.parametrize(
    "runtime",
    [{"shards": 1}, {"tokens_per_batch": 64}, {"workers": 3}, {"layer_memory": 1e-4}],
    ids=str,
)
def test_runtime_changes_no_score_beyond_rounding(single, tmp_path, runtime):
    other = make(tmp_path, runtime=SECTIONS["runtime"] | runtime)
    first, second = scores(single), scores(other)
    assert first.keys() == second.keys()
    largest = max(abs(score) for score in first.values())
    for key, value in first.items():
        # ≤ 1e-6 of the largest: a wrong weight of one shard would show at 1e-2
        assert second[key] == pytest.approx(value, rel=1e-5, abs=1e-6 * largest)


def test_layers_in_groups_leave_the_top_and_the_halves_as_they_are(single, tmp_path):
    """Also where layers that share an input, and so a group, are not neighbours in the model."""
    small = {"runtime": SECTIONS["runtime"] | {"layer_memory": 1e-4}}
    context = stage_context(single.parent.parent, "score")
    attributed = PassReference.of(context).attributed()
    assert len(layers_together(small, single)) > len(layers_together({}, single)) == 1
    assert len(layers_together(small, single)) < len(attributed.layers)
    other = make(tmp_path, **small)
    wanted = store.read_table(single / "score/top.parquet").to_pylist()
    got = store.read_table(other / "score/top.parquet").to_pylist()
    assert [(r["query"], r["row"]) for r in got] == [(r["query"], r["row"]) for r in wanted]
    for one, two in zip(got, wanted, strict=True):
        assert one["influence"] == pytest.approx(two["influence"], rel=1e-5)
        cells, others = (torch.tensor(r["layer_token_influence"]) for r in (one, two))
        torch.testing.assert_close(cells, others, rtol=1e-4, atol=1e-6 * float(others.abs().max()))
    halves = [
        split_half(stage_context(folder.parent.parent, "validate", **sections))
        for folder, sections in ((single, {}), (other, small))
    ]
    assert halves[0].layers == halves[1].layers
    for part in ("first", "second"):
        torch.testing.assert_close(*(getattr(each, part) for each in halves), rtol=1e-4, atol=1e-8)


def layers_together(sections, folder: Path) -> list[tuple[Layer, ...]]:
    """The groups of a rescore of two queries."""
    context = stage_context(folder.parent.parent, "score", **sections)
    reference = PassReference.of(context)
    size = partial(solved_bytes, num_queries=2, itemsize=4)
    return groups_of_layers(context, reference, reference.attributed().layers, size)


def test_groups_of_layers_are_put_side_by_side_in_the_order_of_the_model():
    told = Told()
    for at, names in enumerate((["q", "fc"], ["o"])):  # q and fc share an input
        grid = torch.tensor([[10.0 * at + n] * 3 for n in range(len(names))])
        scores = torch.stack([grid[:, 0]] * 2).unsqueeze(1)
        told.add([7], Rescored(scores, {(1, 0): grid}))
        told.layers.extend(names)
    found = told.tensors(["q", "o", "fc"], {7: 2})
    assert found["7/scores"].tolist() == [11.0, 11.0]
    assert found["7/1"].tolist() == [[0.0, 0.0], [10.0, 10.0], [1.0, 1.0]]


def test_a_model_over_two_devices_gives_the_bytes_of_one(single, tmp_path, monkeypatch):
    sections = {"runtime": SECTIONS["runtime"] | {"device": "spread"}}
    one = split_half(stage_context(single.parent.parent, "validate"))
    with spread_over_two(monkeypatch):
        both = make(tmp_path, **sections)
        halves = split_half(stage_context(tmp_path, "validate", **sections))
    assert torch.equal(halves.first, one.first)
    assert torch.equal(halves.second, one.second)
    for stage in ("factors", "eigen", "correct", "query", "stream", "score"):
        files = [*(single / stage).glob("*.safetensors"), *(single / stage).glob("*.parquet")]
        assert files
        for file in files:
            assert (both / stage / file.name).read_bytes() == file.read_bytes(), file


def test_the_same_run_twice_gives_the_same_bytes(single, tmp_path):
    again = make(tmp_path)
    for file in ("scores.parquet", "top.parquet", "summary.json"):
        if file != "summary.json":
            assert (single / "score" / file).read_bytes() == (again / "score" / file).read_bytes()
    for path in ("factors/factors.safetensors", "correct/spectrum.safetensors"):
        assert (single / path).read_bytes() == (again / path).read_bytes()


def test_factors_count_supervised_tokens_and_spectra_count_sequences(single):
    tokens = store.read_tensors(single / "tokenize/tokens.safetensors")
    num_sequences = len(tokens["offsets"]) - 1
    wanted = SECTIONS["factors"]["sequences"]
    assert num_sequences > wanted
    written = store.read_json(single / "factors/layers.json")
    assert written["num_sequences"] == wanted
    fitted = read_factors(single / "factors/factors.safetensors")
    assert {part.num_tokens for part in fitted.outputs.values()} == {written["num_tokens"]}
    spectra = read_spectra(single / "correct/spectrum.safetensors")
    assert {spectrum.num_sequences for spectrum in spectra.values()} == {wanted}


def test_gate_and_up_share_one_input_factor(single):
    fitted = read_factors(single / "factors/factors.safetensors")
    layers = store.read_json(single / "factors/layers.json")["layers"]
    assert len(fitted.outputs) == 15
    assert len(fitted.inputs) == 10
    groups = {layer["name"]: layer["input_group"] for layer in layers}
    assert groups["model.layers.0.mlp.up_proj"] == groups["model.layers.0.mlp.gate_proj"]


def test_the_header_names_what_is_left_out(single):
    summary = store.read_json(single / "score/summary.json")
    left = {each["name"]: each["reason"] for each in summary["coverage"]["left_out"]}
    assert left["model.embed_tokens"] == "tied to lm_head"
    assert left["model.layers.0.self_attn.q_proj"] == "not in `layers`"
    assert summary["num_training_sequences"] == summary["corpus"]["num_sequences"]
    assert summary["damping"]["rule"] == {"ratio": 0.1}
    assert set(summary["damping"]["layers"]) == set(summary["layers"])
    total = summary["coverage"]["num_attributed"] + sum(
        each["num_parameters"] for each in summary["coverage"]["left_out"]
    )
    assert total == summary["coverage"]["num_parameters"] == 260032


def test_a_huge_damping_leaves_the_gradient_dot_product(tmp_path):
    damping = 1e9
    folder = make(tmp_path, query=SECTIONS["query"] | {"damping": {"value": damping}})
    found = scores(folder)
    for (method, name, row), value in found.items():
        if method == "ekfac":
            # rank 4 truncates both alike only where λ drowns Λ
            assert value * damping == pytest.approx(
                found["gradient_dot", name, row], rel=1e-3, abs=1e-6
            )


def test_a_broken_weight_is_reported_with_layer_and_sequence(single, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "broken"
    checkpoint.mkdir()
    source = ROOT / "data/models/stories260K"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((source / name).read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_lines(tmp_path / "corpus.jsonl", stories(8))
    sections = {"train": {"checkpoint": {"path": str(checkpoint)}}}
    for name in ("train", "tokenize"):
        run_stage(tmp_path, name, STAGES[name], **sections)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj.*NaN.*sequence 'ts-\d"):
        factors.run(stage_context(tmp_path, "factors", **sections))
    assert not (tmp_path / "artifacts/small/factors").exists()


def test_solvers_that_memory_does_not_hold_are_read_anew_and_are_the_same(single):
    fields = store.read_json(single / "factors/layers.json")["layers"]
    layers = [Layer(**each, module=nn.Linear(1, 1)) for each in fields]
    folders = single / "eigen", single / "correct"
    roomy, tight = (StoredSolvers(*folders, layers, torch.float32, memory) for memory in (2**30, 0))
    assert list(roomy) == list(tight) == [layer.name for layer in layers]
    for name in roomy:
        assert roomy[name] is roomy[name]
        assert tight[name] is not tight[name]
        assert torch.equal(roomy[name].eigenvalues, tight[name].eigenvalues)
        assert torch.equal(roomy[name].basis.Q_A, tight[name].basis.Q_A)
