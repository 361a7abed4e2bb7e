"""Stage `train`: a checkpoint linked, or a small model trained from scratch, and its faults."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import scratch, store, tokenize, train
from tasks.checkpoints import read_reference
from tasks.models import generate_greedy, load_model, load_tokenizer
from tasks.origin import Architecture
from tasks.sequences import TokenStore
from tests.small_run import MODEL, run_stage, write_lines

STORIES = [
    {"id": str(n), "text": f"The {word} sat on the {other}. It was happy. " * 3}
    for n, (word, other) in enumerate([("cat", "mat"), ("dog", "log"), ("hen", "pen")] * 8)
]
SCRATCH = {
    "architecture": "gpt2",
    "width": 16,
    "layers": 2,
    "heads": 2,
    "vocabulary": 300,
    "context": 32,
    "steps": 30,
    "batch": 4,
    "learning_rate": 1e-2,
    "seed": 0,
}
SHORT = {"mode": "document", "context": 32, "bos": True, "eos": True}


def trained(root: Path, sections: dict | None = None, **architecture) -> Path:
    root.mkdir(exist_ok=True)
    write_lines(root / "corpus.jsonl", STORIES)
    return run_stage(
        root,
        "train",
        train,
        **{"train": {"scratch": SCRATCH | architecture}, "tokenize": SHORT} | (sections or {}),
    )


# --- a given checkpoint --------------------------------------------------------------------------


def linked(root: Path, path: Path | str) -> Path:
    return run_stage(root, "train", train, train={"checkpoint": {"path": str(path)}})


def test_linking_writes_where_the_checkpoint_is_and_what_it_holds(tmp_path):
    shutil.copytree(MODEL, tmp_path / "models/here")
    folder = linked(tmp_path, "models/here")
    assert [file.name for file in folder.iterdir()] == ["model.json"]
    written = store.read_json(folder / "model.json")
    assert written["source"] == "checkpoint"
    assert written["path"] == "models/here"  # no folder of this machine
    assert written["parameters"] == 260_032
    assert (written["vocabulary"], written["context"]) == (512, 512)
    weights = MODEL / "model.safetensors"
    assert written["files"]["model.safetensors"] == store.digest(weights)
    assert "LICENSE" not in written["files"]
    reference = read_reference(folder, tmp_path)
    assert reference.folder == tmp_path / "models/here"
    assert reference.digest == written["digest"]


def test_checkpoint_that_has_gone_is_an_error_that_names_the_file(tmp_path):
    shutil.copytree(MODEL, tmp_path / "here")
    folder = linked(tmp_path, "here")
    (tmp_path / "here/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"here: the checkpoint's model\.safetensors is not there"):
        read_reference(folder, tmp_path)


def test_digest_follows_the_content(tmp_path):
    shutil.copytree(MODEL, tmp_path / "here")
    before = read_reference(linked(tmp_path, "here"), tmp_path).digest
    config = json.loads((tmp_path / "here/config.json").read_text())
    (tmp_path / "here/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert read_reference(linked(tmp_path, "here"), tmp_path).digest != before


def test_hub_checkpoint_is_recorded_by_id_and_revision(tmp_path, monkeypatch):
    # Stands in for the hub's cache, which lies elsewhere on every machine.
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"]))
        return str(MODEL)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    given = {"checkpoint": {"hub": "org/name", "revision": "a" * 40}}
    folder = run_stage(tmp_path, "train", train, train=given)
    written = store.read_json(folder / "model.json")
    assert (written["source"], written["path"]) == ("hub", "org/name")
    assert written["revision"] == "a" * 40
    assert read_reference(folder, tmp_path).folder == MODEL
    assert set(asked) == {("org/name", "a" * 40)}


def test_bad_checkpoints_stop_the_stage(tmp_path):
    with pytest.raises(ValueError, match=r"train\.checkpoint\.path: .*absent: no checkpoint"):
        linked(tmp_path, "absent")
    broken = Path(shutil.copytree(MODEL, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"broken: no tokenizer there"):
        linked(tmp_path, "broken")


def test_tokenizer_of_another_model_stops_the_stage(tmp_path):
    mixed = Path(shutil.copytree(MODEL, tmp_path / "mixed"))
    scratch.train_tokenizer(
        [" ".join(f"{n:x}{n * 7:o}" for n in range(3000))], vocabulary=700
    ).save_pretrained(mixed)
    with pytest.raises(ValueError, match=r"does not fit the model: .* up to 699 .* has 512"):
        linked(tmp_path, "mixed")
    assert not (tmp_path / "artifacts").exists()


# --- from scratch --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scratch_model_learns_its_corpus_and_loads_as_a_checkpoint(tmp_path, architecture):
    folder = trained(tmp_path, architecture=architecture, steps=60)
    reference = read_reference(folder, tmp_path)
    assert (reference.source, reference.path) == ("scratch", "checkpoint")
    assert reference.folder == folder / "checkpoint"
    assert reference.context == 32
    written = store.read_json(folder / "train.json")
    assert written["losses"][-1]["loss"] < 0.7 * written["losses"][0]["loss"]
    assert written["num_parameters"] == reference.num_parameters
    model = load_model(reference.folder, "cpu", torch.float32)
    assert model.config.model_type == architecture
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = load_tokenizer(reference.folder)
    assert reference.vocabulary == len(tokenizer) == written["vocabulary"]
    start = [tokenizer.bos_token_id, *tokenizer("The", add_special_tokens=False)["input_ids"]]
    assert len(generate_greedy(model, start, 5)) == 5


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    three = trained(tmp_path / "three", seed=1)
    weights = "checkpoint/model.safetensors"
    assert store.digest(one) == store.digest(two)
    assert store.digest(one / weights) != store.digest(three / weights)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_first_loss_is_the_mean_over_targets_of_the_untrained_model(architecture, tmp_path):
    # 0.984 of it (63/64) when the first token of each sequence is counted as a target.
    settings = Architecture(**SCRATCH | {"architecture": architecture, "steps": 1, "batch": 4})
    model = scratch.new_model(settings, 300)
    rows = [np.arange(n, n + 32, dtype=np.int32) for n in (0, 50, 100)]
    rows.append(np.arange(8, dtype=np.int32))  # padded in the batch
    rows.append(np.arange(1, dtype=np.int32))  # nothing to predict: left out
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(torch.from_numpy(row).long()[None]).logits[0, :-1],
                torch.from_numpy(row).long()[1:],
                reduction="sum",
            )
            for row in rows[:4]
        ]
    expected = float(sum(losses)) / (3 * 31 + 7)
    targets = [np.arange(len(row)) > 0 for row in rows]
    (first,) = train.train_model(model, rows, targets, settings, tmp_path / "trainer", "cpu")
    assert first == {"step": 1, "loss": pytest.approx(expected, rel=1e-5)}


def test_scratch_training_leaves_the_global_generator_of_model_building_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    scratch.new_model(Architecture(**SCRATCH), 300)
    assert torch.equal(torch.rand(1), expected)


def test_scratch_tokenizer_writes_any_text_and_knows_its_special_tokens():
    tokenizer = scratch.train_tokenizer(["hello hello"], vocabulary=270)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    text = "héllo 🙂\n한"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    # Too little text for 270 - 258 merges: the vocabulary is what there is.
    assert len(tokenizer) <= 270


def test_model_is_trained_on_the_sequences_that_are_measured(tmp_path):
    folder = trained(tmp_path)
    written = store.read_json(folder / "train.json")
    tokens = TokenStore.open(run_stage(tmp_path, "tokenize", tokenize, tokenize=SHORT))
    assert written["num_sequences"] == tokens.num_sequences
    assert written["num_tokens"] == len(tokens.tokens)


def test_bad_corpus_stops_before_training(tmp_path, monkeypatch):
    write_lines(tmp_path / "corpus.jsonl", [*STORIES, {"id": "x"}])
    monkeypatch.setattr(train, "train_model", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match=r"corpus\.jsonl:25: no field 'text'"):
        run_stage(tmp_path, "train", train, train={"scratch": SCRATCH}, tokenize=SHORT)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_STEPS", 4)
    settings = Architecture(**SCRATCH | {"steps": 12, "batch": 2})
    rows = [np.arange(n, n + 16, dtype=np.int32) for n in range(0, 200, 20)]
    targets = [np.ones(16, dtype=bool)] * len(rows)

    def learn(work: Path, tick) -> tuple[dict, list]:
        model = scratch.new_model(settings, 300)
        losses = train.train_model(model, rows, targets, settings, work, "cpu", tick)
        return model.state_dict(), losses

    def kill_at_ten(steps: int) -> None:
        done.append(steps)
        if sum(done) == 10:
            raise KeyboardInterrupt

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", kill_at_ten)
    broken = tmp_path / "killed/checkpoint-9"  # as a kill in the middle of writing leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    ticks: list[tuple[int, bool]] = []
    resumed, losses = learn(
        tmp_path / "killed", lambda steps, cached=False: ticks.append((steps, cached))
    )
    assert ticks == [(8, True), *[(1, False)] * 4]  # from the checkpoint of step 8
    whole, expected = learn(tmp_path / "whole", lambda _steps: None)
    assert losses == expected
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# --- trained on ----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATS = [
    {
        "id": str(n),
        "messages": [
            {"role": "user", "content": f"Where sat the {word}?"},
            {"role": "assistant", "content": f"On the {other}."},
        ],
    }
    for n, (word, other) in enumerate([("cat", "mat"), ("dog", "log"), ("hen", "pen")] * 8)
]
CHAT_CORPUS = {"path": "chats.jsonl", "messages": "messages", "id": "id", "limit": None}


def tuned(root: Path, base: Path | str, context: int = 32, **tuning) -> Path:
    write_lines(root / "chats.jsonl", CHATS)
    finetune = {"path": str(base), "chat_template": TEMPLATE, "steps": 40, "batch": 8}
    finetune |= {"learning_rate": 1e-2, "seed": 0} | tuning
    return run_stage(
        root,
        "train",
        train,
        train={"finetune": finetune},
        tokenize=SHORT | {"bos": False, "eos": False, "context": context},
        corpus=CHAT_CORPUS,
    )


def test_a_fine_tuned_model_answers_as_its_conversations_do(tmp_path):
    base = trained(tmp_path / "base") / "checkpoint"
    folder = tuned(tmp_path, base)
    reference = read_reference(folder, tmp_path)
    assert (reference.source, reference.path) == ("finetuned", "checkpoint")
    assert store.read_json(folder / "train.json")["steps"] == 40

    model, tokenizer = (
        load_model(reference.folder, "cpu", torch.float32),
        load_tokenizer(reference.folder),
    )
    asked = tokenizer.apply_chat_template(CHATS[1]["messages"][:1], tokenize=False)
    answer = generate_greedy(model, tokenizer.encode(asked), 30, tokenizer.eos_token_id)
    assert tokenizer.decode(answer) == " On the log."


def test_fine_tuning_teaches_what_the_assistant_says_alone(tmp_path):
    folder = tuned(tmp_path, trained(tmp_path / "base") / "checkpoint", steps=1, batch=len(CHATS))
    tokenizer = load_tokenizer(folder / "checkpoint")
    base = load_model(tmp_path / "base/artifacts/small/train/checkpoint", "cpu", torch.float32)
    total = count = 0
    for chat in CHATS:
        asked = tokenizer.apply_chat_template(chat["messages"][:1], tokenize=False)
        whole = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        tokens, first = tokenizer.encode(whole), len(tokenizer.encode(asked))
        logs = base(torch.tensor([tokens])).logits[0].log_softmax(-1)
        said = range(first, len(tokens))
        total -= sum(float(logs[at - 1, tokens[at]]) for at in said)
        count += len(said)
    [first_loss] = store.read_json(folder / "train.json")["losses"]
    assert first_loss["loss"] == pytest.approx(total / count, rel=1e-4)


def test_fine_tuning_leaves_its_base_as_it_was(tmp_path):
    base = trained(tmp_path / "base") / "checkpoint"
    before = {file.name: store.digest(file) for file in base.iterdir()}
    tuned(tmp_path, base, steps=1)
    assert {file.name: store.digest(file) for file in base.iterdir()} == before


def test_fine_tuning_names_what_is_wrong_with_its_base(tmp_path):
    with pytest.raises(ValueError, match=r"train\.finetune\.path: .*no checkpoint there"):
        tuned(tmp_path, "nowhere")


def test_fine_tuning_refuses_windows_longer_than_the_model_reads(tmp_path):
    base = trained(tmp_path / "base", context=32) / "checkpoint"
    with pytest.raises(ValueError, match=r"tokenize\.context 64 .* 32 positions"):
        tuned(tmp_path, base, context=64)
