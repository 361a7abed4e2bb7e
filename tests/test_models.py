"""Loading checkpoints and tokenizers, replicas for threads, and the text of tokens."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tasks import checkpoints
from tasks.checkpoints import ModelReference, hub_snapshot
from tasks.models import (
    boundary_token,
    check_tokenizer_fits,
    context_length,
    generate_greedy,
    load_model,
    load_tokenizer,
    model_for_thread,
    replicate,
    vocabulary_size,
)
from tasks.pieces import decode_pieces

MODEL = Path(__file__).parents[1] / "data/models/stories260K"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, "cpu", torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the embedded checkpoint, to be spoilt."""
    return Path(shutil.copytree(MODEL, tmp_path / "checkpoint"))


def test_model_is_loaded_for_measuring(model):
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert (vocabulary_size(model), context_length(model)) == (512, 512)
    assert load_model(MODEL, "cpu", torch.float64).dtype == torch.float64


def test_greedy_text_is_the_published_one(model, tokenizer):
    # The first words that llama2.c's own test expects of this checkpoint.
    tokens = generate_greedy(model, [boundary_token(tokenizer, "bos")], 40)
    assert (
        tokenizer.decode(tokens)
        .strip()
        .startswith(
            "Once upon a time, there was a little girl named Lily. "
            "She loved to play outside in the park."
        )
    )


def test_greedy_generation_ends_before_the_stop_token(model, tokenizer):
    start = [boundary_token(tokenizer, "bos")]
    free = generate_greedy(model, start, 10)
    assert generate_greedy(model, start, 10, stop=free[4]) == free[: free.index(free[4])]


def test_replicas_share_weights_and_not_hooks(model):
    replica = replicate(model)
    pairs = list(zip(model.named_parameters(), replica.named_parameters(), strict=True))
    assert all(one[1] is other[1] for one, other in pairs)
    assert all(
        one.data_ptr() == other.data_ptr()
        for one, other in zip(model.buffers(), replica.buffers(), strict=True)
    )
    seen = []
    replica.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    tokens = torch.tensor([[1, 403, 407]])
    torch.testing.assert_close(model(tokens).logits, replica(tokens).logits, rtol=0, atol=0)
    assert seen == [1]
    assert not model.model.layers[0].mlp.down_proj._forward_hooks


def reference(folder: Path, digest: str = "x") -> ModelReference:
    return ModelReference(
        "checkpoint", "here", None, folder, (("config.json", digest),), 260_032, 512, 512
    )


def test_threads_get_replicas_of_one_model_loaded_once(monkeypatch):
    loads, found = [], {}

    def counting_load(*arguments):
        loads.append(arguments)
        return load_model(*arguments)

    monkeypatch.setattr("tasks.models.load_model", counting_load)

    def work(name: str) -> None:
        first = model_for_thread(reference(MODEL, "threads"), "cpu", torch.float32)
        assert model_for_thread(reference(MODEL, "threads"), "cpu", torch.float32) is first
        found[name] = first

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len({id(model) for model in found.values()}) == 3
    assert len({next(model.parameters()).data_ptr() for model in found.values()}) == 1


def test_another_dtype_or_content_is_another_model():
    one = model_for_thread(reference(MODEL), "cpu", torch.float32)
    assert model_for_thread(reference(MODEL), "cpu", torch.float64).dtype == torch.float64
    assert model_for_thread(reference(MODEL, "y"), "cpu", torch.float32) is not one


def test_absent_checkpoint_and_pickled_weights_are_errors(checkpoint):
    with pytest.raises(ValueError, match=r"nowhere: no checkpoint there; a folder with config"):
        load_model(checkpoint / "nowhere", "cpu", torch.float32)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors there; only safetensors are read"):
        load_model(checkpoint, "cpu", torch.float32)


def test_missing_weights_are_an_error_and_not_random_numbers(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(ValueError, match=r"lacks the weights \['model\.layers\.5\."):
        load_model(checkpoint, "cpu", torch.float32)


def test_spoilt_weights_are_an_error_with_the_folder(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"checkpoint: cannot be loaded"):
        load_model(checkpoint, "cpu", torch.float32)


def test_absent_tokenizer_is_an_error_and_not_an_empty_one(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer there"):
        load_tokenizer(checkpoint)


def test_tokenizer_with_more_tokens_than_the_model_names_both_sizes(model, checkpoint):
    larger = load_tokenizer(checkpoint)
    check_tokenizer_fits(larger, model)
    larger.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"ids go up to 512 \(513 tokens\), .* vocabulary has 512"):
        check_tokenizer_fits(larger, model)


def test_absent_boundary_token_says_what_to_set(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"has no BOS token; set tokenize\.bos to false"):
        boundary_token(tokenizer, "bos")


def test_hub_checkpoint_comes_from_the_cache_or_says_why_not(monkeypatch, tmp_path):
    calls = []

    def offline(name, **options):
        calls.append(options.get("local_files_only", False))
        raise OSError("no route to the hub")

    monkeypatch.setattr(checkpoints.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'org/name' at revision 'abc' .*no route to the hub"):
        hub_snapshot("org/name", "abc")
    assert calls == [True, False]
    monkeypatch.setattr(
        checkpoints.huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path)
    )
    assert hub_snapshot("org/name", "abc") == tmp_path


# --- pieces --------------------------------------------------------------------------------------

TEXTS = ["Once upon a time, 🙂 said: “café”!\n\nThe end. ", "a", "  two spaces", "한국어 🙂🙃"]


def byte_level_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A GPT-2 kind of tokenizer, trained here; emoji fall apart into bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["Once upon a time the end said the cat"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=["byte-fallback", "byte-level"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "byte-fallback" else byte_level_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_into_the_text(any_tokenizer, text):
    tokens = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = decode_pieces(any_tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_are_spelt_out_around_the_text(any_tokenizer, text):
    body = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    bos, eos = boundary_token(any_tokenizer, "bos"), boundary_token(any_tokenizer, "eos")
    pieces = decode_pieces(any_tokenizer, [bos, *body, eos, bos, *body])
    assert "".join(pieces) == f"<s>{text}</s><s>{text}"


def test_character_of_several_tokens_belongs_to_its_last(any_tokenizer):
    tokens = any_tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert decode_pieces(any_tokenizer, tokens)[-5:] == ["", "", "", "🙂", "b"]


def test_window_that_goes_on_keeps_its_first_space(tokenizer):
    tokens = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"][1:]
    assert "".join(decode_pieces(tokenizer, tokens, continued=True)) == " upon a time"
    assert "".join(decode_pieces(tokenizer, tokens)) == "upon a time"


def test_character_cut_by_a_window_shows_as_a_replacement(any_tokenizer):
    tokens = any_tokenizer("🙂b", add_special_tokens=False)["input_ids"]
    pieces = decode_pieces(any_tokenizer, tokens[-3:], continued=True)
    assert len(pieces) == 3
    assert "".join(pieces).strip("�") == "b"
    assert decode_pieces(any_tokenizer, tokens[:-1][-3:-1], continued=True)[-1].endswith("�")


def test_other_decoders_give_pieces_that_join_too():
    backend = Backend(models.WordLevel({"once": 0, "upon": 1, "a": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert decode_pieces(words, [0, 1, 2]) == ["once", " upon", " a"]
