"""Adapters and mixtures of experts are sized from configurations: against what small ones take."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from influence import costs
from influence.eigenbasis import EigenBasis
from influence.experts import Experts
from influence.factors import fit_factors
from influence.layers import Layer
from influence.objectives import training_loss
from influence.passes import pseudo_gradients, run_pass
from influence.sequences import TokenBatch
from influence.spectrum import fit_spectra
from tasks import adapters, store
from tasks.attributed import Attributed, PassReference
from tasks.budget import find_budget
from tasks.models import load_model
from tasks.params import RunParams
from tasks.planning import probe, startup
from tasks.planning.estimate import run_sizes
from tasks.planning.model import model_sizes
from tasks.planning.plan import plan_key, plan_run
from tasks.planning.planned import Planned
from tasks.planning.probe import probe_rates
from tasks.planning.stages import stage_costs
from tests.influence.models import randomise
from tests.influence.test_costs import counted
from tests.planning.eager import eager_attention
from tests.planning.test_plan import ROOMY, STARTED
from tests.small_run import MODEL, SECTIONS, stage_context
from tests.test_curvature_stages import make

EXPERTS, CHOSEN = 4, 2
WIDTH, HIDDEN, VOCABULARY = 64, 48, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "num_local_experts": EXPERTS, "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def adapter(folder: Path, **options: Any) -> dict[str, Any]:
    """Sections of a run of a LoRA whose matrices are not zero, in some blocks alone."""
    config = peft.LoraConfig(
        r=6, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2, 4],
        **options,
    )  # fmt: skip
    model: Any = peft.get_peft_model(load_model(MODEL, "cpu", torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    checkpoint = {"adapter": str(folder), "base": str(MODEL)}
    return {"train": {"checkpoint": checkpoint}, "layers": ["adapter"]}


def mixture(folder: Path, kind: str = "mixtral") -> dict[str, Any]:
    """Sections of a run of a mixture whose experts are all reached."""
    config = AutoConfig.for_model(kind, **SIZES)
    randomise(AutoModelForCausalLM.from_config(config), 0).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    runtime = SECTIONS["runtime"] | {"dtype": "bfloat16"}
    return {
        "train": {"checkpoint": {"path": str(folder)}}, "layers": ["mlp"], "runtime": runtime,
    }  # fmt: skip


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {"adapter": adapter, "mixture": mixture}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The root of a small run that went through its stages, and its sections."""
    root = tmp_path_factory.mktemp(request.param)
    sections = KINDS[request.param](root / "given")
    make(root, **sections)
    return root, sections


@pytest.fixture(scope="module")
def planned(run) -> Planned:
    root, sections = run
    params = RunParams.model_validate(SECTIONS | sections)
    sizes, _ = run_sizes(root, params, root / "artifacts/small")
    return Planned(params, sizes, ROOMY)


@pytest.fixture(scope="module")
def there(run) -> Iterator[Attributed]:
    """The model as stages have it, its attention in plain products."""
    root, sections = run
    with eager_attention():
        yield PassReference.of(stage_context(root, "factors", **sections)).attributed()


def batch(count: int = 4, length: int = 32) -> TokenBatch:
    supervised = torch.ones(count, length, dtype=torch.bool)
    supervised[:, 0] = False
    return TokenBatch(torch.arange(count), torch.randint(VOCABULARY, (count, length)), supervised)


def described(layers: tuple[Layer, ...]) -> list[tuple[Any, ...]]:
    return [(each.name, each.d_in, each.d_out, each.has_bias, each.input_group) for each in layers]


def test_the_layers_and_weights_are_those_that_stages_see(planned, there):
    shape = planned.sizes.model.shape
    assert described(shape.layers) == described(there.layers)
    assert shape.num_parameters == there.coverage.num_parameters


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("factors", "factors.safetensors"),
        ("eigen", "eigen.safetensors"),
        ("correct", "spectrum.safetensors"),
        ("query", "prepared.safetensors"),
    ],
)
def test_files_are_as_large_as_planned(run, planned, stage, file):
    written = (run[0] / "artifacts/small" / stage / file).stat().st_size
    [cost] = [each for each in stage_costs(planned) if each.stage == stage]
    told = {"factors": 500 * len(planned.layers), "query": 700 * 2}.get(stage, 0)  # JSON beside it
    assert cost.disk - told == pytest.approx(written, rel=0.03)


def test_a_pass_costs_the_base_and_of_experts_those_that_tokens_are_routed_to(planned, there):
    shape, tokens = planned.sizes.model.shape, batch()
    told = tokens.tokens.numel() * costs.pass_flop(shape, tokens.tokens.shape[1])
    done = counted(lambda: run_pass(there.model, there.layers, tokens, training_loss))
    # Below the lowest attributed layer nothing flows back: half of it, and what comes before.
    assert 0.7 * told < done <= told
    dense = replace(shape, num_multiplied=there.coverage.num_parameters)
    if shape.routed:
        assert done < 0.7 * tokens.tokens.numel() * costs.pass_flop(dense, 32)


def test_covariances_cost_what_they_do(planned, there):
    """However unevenly tokens are routed: all experts are of one size."""
    tokens = batch()
    whole = counted(lambda: fit_factors(there.model, there.layers, [tokens], 0))
    alone = counted(lambda: pseudo_gradients(there.model, there.layers, tokens, 0))
    rows = int(tokens.loss_positions.sum())
    assert whole - alone == pytest.approx(rows * costs.factor_flop(planned.sizes.model.shape))


def test_rotations_cost_what_they_do_where_tokens_are_routed_by_chance(planned, there):
    def by_chance(_module: Experts, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights = inputs
        return hidden, torch.rand(len(index), EXPERTS).topk(CHOSEN).indices, weights

    handles = [
        each.register_forward_pre_hook(by_chance)
        for each in there.model.modules()
        if isinstance(each, Experts)
    ]
    tokens, dtype = batch(8, 32), next(there.model.parameters()).dtype
    bases = {
        each.name: EigenBasis(torch.eye(each.d_in), torch.eye(each.d_out)).to(dtype, "cpu")
        for each in there.layers
    }
    try:
        whole = counted(lambda: fit_spectra(there.model, there.layers, bases, [tokens], 0))
        alone = counted(lambda: pseudo_gradients(there.model, there.layers, tokens, 0))
    finally:
        for handle in handles:
            handle.remove()
    runtime = planned.params.runtime.model_copy(update={"tokens_per_batch": 8 * 32})
    columns = replace(
        planned, params=planned.params.model_copy(update={"runtime": runtime})
    ).columns(32)
    told = 8 * sum(costs.rotation_flop(each, columns(each)) for each in there.layers)
    assert whole - alone == pytest.approx(told, rel=0.06)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_what_a_pass_of_a_mixture_holds_grows_as_autograd_says(kind, tmp_path):
    sections = mixture(tmp_path / "model", kind)
    params = RunParams.model_validate(SECTIONS | sections)
    sizes = model_sizes(params, tmp_path, tmp_path / "none", 64)
    assert 4 * sizes.held == pytest.approx(held(tmp_path / "model", sections["layers"]), rel=0.2)


def test_what_a_pass_beside_an_adapter_holds_grows_as_autograd_says(tmp_path):
    sections = adapter(tmp_path / "given")
    params = RunParams.model_validate(SECTIONS | sections)
    sizes = model_sizes(params, tmp_path, tmp_path / "none", 64)
    told = 4 * sizes.held
    assert told == pytest.approx(held(MODEL, sections["layers"], tmp_path / "given"), rel=0.35)


def held(folder: Path, patterns: list[str], adapter: Path | None = None) -> int:
    """Bytes a token of the real weights."""
    from influence.experts import separate_experts
    from influence.layers import find_layers

    model = separate_experts(load_model(folder, "cpu", torch.float32, adapter))
    layers, _ = find_layers(model, patterns)
    return find_budget(model, layers, 64, "cpu", 1).bytes_per_token


def test_rates_are_timed_on_adapters_and_experts(planned, monkeypatch):
    monkeypatch.setattr(probe, "ENOUGH", 0.0)
    rates = probe_rates(planned, "cpu", STARTED)
    assert rates.by_token is not None
    assert min(rates.by_token.values()) > 0
    assert None not in (rates.fb, rates.by_query, rates.eigen, rates.flops)


def test_a_plan_tells_what_it_counts(run, monkeypatch):
    root, sections = run
    store.write_text(root / "params/active.yaml", "fits: {}\nruns: {}\nbenchmarks: {}\n")
    store.write_json(root / "params/small.yaml", SECTIONS | sections)
    hardware = "tflops=400,memory=80GiB,host_memory=64GiB,disk=1TiB"
    [told, *_] = plan_run(root, "small", "small", hardware).told
    if sections["layers"] == ["adapter"]:
        assert told.startswith("model with an adapter: ")
        assert told.endswith(" in 18 layers")
    else:
        assert "of which a token meets" in told
        assert told.endswith(f" in {2 * 2 * EXPERTS} layers")


def test_a_plan_is_made_anew_where_the_adapter_is_another(tmp_path):
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).touch()
    params = RunParams.model_validate(SECTIONS | adapter(tmp_path / "given"))
    before = plan_key(tmp_path, "small", "small", params)
    assert plan_key(tmp_path, "small", "small", params) == before
    file = tmp_path / "given/adapter_config.json"
    store.write_json(file, store.read_json(file) | {"r": 3})
    assert plan_key(tmp_path, "small", "small", params) != before


def test_a_process_that_loads_an_adapter_is_sized_with_peft(tmp_path, monkeypatch, capsys):
    adapter(tmp_path)
    asked: list[bool] = []
    monkeypatch.setattr(adapters, "peft_module", lambda: asked.append(True))
    monkeypatch.setattr(startup, "TOOLS", ())
    monkeypatch.setattr(startup, "CHECKS", ())
    startup.main([str(MODEL), str(tmp_path)])
    assert asked
    assert json.loads(capsys.readouterr().out)["bytes"] > 0


def test_a_large_mixture_is_sized_from_its_configuration(tmp_path):
    """Mixtral 8x7B: 46.7 billion weights, of which a token meets some 12.7 (and an embedding)."""
    AutoConfig.for_model(
        "mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    given = {"train": {"checkpoint": {"path": str(tmp_path)}}, "layers": ["mlp"]}
    shape = model_sizes(RunParams.model_validate(SECTIONS | given), tmp_path, tmp_path, 64).shape
    assert shape.num_parameters == 46_702_792_704
    attention, expert = 4096 * 4096 * 2 + 2 * 4096 * 1024, 3 * 4096 * 14336
    met = 32 * (attention + 2 * expert + 4096 * 8) + 4096 * 32000
    assert shape.num_multiplied == met
    assert len(shape.layers) == 32 * 8 * 2
    assert costs.num_weights(shape.layers) == 32 * 8 * expert


def test_an_adapter_of_a_large_model_is_sized_without_its_weights(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights="pissa")
    lora.save_pretrained(tmp_path / "lora")
    checkpoint = {"adapter": "lora", "base": "base"}
    given = {"train": {"checkpoint": checkpoint}, "layers": ["adapter"]}
    found = model_sizes(RunParams.model_validate(SECTIONS | given), tmp_path, tmp_path / "none", 64)
    assert found.adapter == tmp_path / "lora"
    attributed = 32 * 2 * 16 * 4096
    assert found.shape.num_parameters == 8_030_261_248 + attributed
    assert costs.num_weights(found.shape.layers) == attributed
    embedding, norms = 128256 * 4096, (2 * 32 + 1) * 4096
    assert found.shape.num_multiplied == 8_030_261_248 - embedding - norms + attributed
