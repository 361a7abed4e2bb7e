"""Adapter folders: loaded beside their base, unmerged; what is wrong with one is said."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

from tasks import store, train
from tasks.active import check_inputs, fit_entry
from tasks.attributed import PassReference
from tasks.checkpoints import read_reference
from tasks.models import load_model
from tasks.params import RunParams
from tests.small_run import MODEL, SECTIONS, run_stage, stage_context, write_lines

TOKENS = torch.tensor([[1, 403, 407, 261]])


def adapted(**options):
    """The base in float32 with a LoRA that changes what it says."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)
    model = peft.get_peft_model(load_model(MODEL, "cpu", torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder as peft writes it, and the logits of what was written."""
    model, folder = adapted(lora_dropout=0.1), tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(TOKENS).logits


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(written[0], tmp_path / "adapter"))


def loaded(folder: Path, dtype=torch.float32):
    return load_model(MODEL, "cpu", dtype, folder)


def test_an_adapter_is_loaded_beside_its_base_and_not_merged(written):
    folder, logits = written
    model = loaded(folder)
    torch.testing.assert_close(model(TOKENS).logits, logits, rtol=0, atol=1e-6)
    base = load_model(MODEL, "cpu", torch.float32)
    assert (base(TOKENS).logits - logits).abs().max() > 0.1
    name = "model.layers.0.self_attn.q_proj"
    kept = model.get_submodule(name).base_layer.weight
    assert torch.equal(kept, base.get_submodule(name).weight)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_all_weights_take_the_dtype_of_the_pass(written):
    model = loaded(written[0], torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def configure(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_without_an_adapter_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter there; .*adapter_config\.json"):
        loaded(tmp_path)


def test_pickled_weights_are_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors there; only safetensors"):
        loaded(folder)


def test_another_kind_of_adapter_is_named(folder):
    configure(folder, peft_type="IA3")
    with pytest.raises(ValueError, match=r"of the kind 'IA3'; LORA alone"):
        loaded(folder)


def test_a_variant_of_lora_is_refused_for_its_gradient(tmp_path):
    adapted(use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj' is adapted by a variant of LoRA \(Dora"):
        loaded(tmp_path)


def test_adapted_parameters_are_refused(folder):
    configure(folder, target_parameters=["mlp.down_proj.weight"])
    with pytest.raises(ValueError, match=r"adapts parameters \(mlp\.down_proj\.weight\)"):
        loaded(folder)


def test_an_adapter_of_another_model_is_an_error_and_not_random_weights(folder):
    configure(folder, target_modules=["q_proj", "down_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"lacks the weights .*up_proj.*base"):
        loaded(folder)
    configure(folder, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"has unknown the weights .*down_proj"):
        loaded(folder)
    configure(folder, target_modules=["nowhere"])
    with pytest.raises(ValueError, match=r"does not fit the base model .*nowhere"):
        loaded(folder)


def test_an_adapter_in_the_place_of_a_checkpoint_says_where_it_belongs(folder):
    with pytest.raises(ValueError, match=r"train\.checkpoint\.adapter, .*train\.checkpoint\.base"):
        load_model(folder, "cpu", torch.float32)


# ---- in a run


def given(folder: Path) -> dict:
    return {"checkpoint": {"adapter": str(folder), "base": str(MODEL)}}


def test_a_run_of_an_adapter_attributes_its_matrices(folder, tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [{"id": "1", "text": "Once upon a time"}])
    sections = {"train": given(folder), "layers": ["adapter"]}
    out = run_stage(tmp_path, "train", train, **sections)
    reference = read_reference(out, tmp_path)
    assert reference.name == f"{folder} on {MODEL}"
    assert reference.adapter_folder == folder
    names = {name for name, _ in reference.files}
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= names
    assert reference.num_parameters == sum(p.numel() for p in loaded(folder).parameters())
    context = stage_context(tmp_path, "factors", **sections)
    there = PassReference(
        reference, context.work, ("adapter",), "cpu", "float32", 64
    ).attributed()  # fmt: skip
    assert len(there.layers) == 2 * 2 * 5
    assert all(".lora_" in layer.name for layer in there.layers)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter/adapter_model\.safetensors is not there"):
        read_reference(out, tmp_path)


def test_another_adapter_on_the_same_base_is_another_model(folder, tmp_path):
    def digest() -> str:
        run_stage(tmp_path, "train", train, train=given(folder))
        return store.read_json(tmp_path / "artifacts/small/train/model.json")["digest"]

    before = digest()
    tensors = store.read_tensors(folder / "adapter_model.safetensors")
    store.write_tensors(
        folder / "adapter_model.safetensors", {k: 2 * v for k, v in tensors.items()}
    )
    assert digest() != before


def test_the_params_of_an_adapter_name_two_folders_and_dvc_watches_its_own(tmp_path):
    section = {"checkpoint": {"adapter": "adapter", "base": "base"}}
    params = RunParams.model_validate(SECTIONS | {"train": section})
    assert fit_entry(params).model == "adapter"
    for name in ("corpus.jsonl", "queries.jsonl", "adapter"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"`train\.checkpoint\.base`: given 'base'"):
        check_inputs(tmp_path, "small", params)
    with pytest.raises(ValueError, match=r"base"):
        RunParams.model_validate(SECTIONS | {"train": {"checkpoint": {"adapter": "adapter"}}})


def test_an_error_in_an_adapter_names_its_key(folder, tmp_path):
    configure(folder, peft_type="IA3")
    with pytest.raises(ValueError, match=r"^train\.checkpoint\.adapter: .*IA3"):
        run_stage(tmp_path, "train", train, train=given(folder))
