"""Query lines beyond prompt and completion: conversations, generated completions, tags."""

import shutil
from pathlib import Path

import pytest

from tasks import filter, query, store, tokenize, train
from tasks.checkpoints import read_reference
from tasks.generated import COMPLETIONS, queries_of
from tasks.models import (
    boundary_token,
    continuation_text,
    generate_greedy,
    load_model,
    load_tokenizer,
)
from tasks.querylines import check_queries
from tasks.querysets import load_queries
from tests.small_run import MODEL, run_stage, stage_context, write_lines

LILY = {"name": "lily", "prompt": "Once upon a time, there was a", "completion": " little girl."}
ASKED = [{"role": "user", "content": "Who is Lily?"}]
TALK = [*ASKED, {"role": "assistant", "content": "A little girl."}]
LONG = [*TALK, {"role": "user", "content": "And Tom?"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def chatty():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(folder: Path, *queries: dict) -> Path:
    return write_lines(folder / "q.jsonl", list(queries))


# --- conversations -------------------------------------------------------------------------------


def test_of_a_conversation_the_last_turn_is_the_completion(tmp_path, chatty):
    """All before it, in the words of the template, is the prompt, earlier answers included."""
    messages = [*LONG, {"role": "assistant", "content": "Her dog."}]
    file = lines(tmp_path, {"name": "x", "messages": messages})
    (query,) = load_queries(file, chatty, bos=True, context=512)
    assert query.prompt == (
        "[user] Who is Lily? [end]\n[assistant] A little girl. [end]\n[user] And Tom? [end]\n"
        "[assistant] "
    )
    assert query.completion == "Her dog. [end]"
    assert query.extra == {}
    whole = chatty(query.prompt + query.completion, add_special_tokens=False)["input_ids"]
    assert [*query.prompt_tokens[1:], *query.completion_tokens] == whole


def test_the_contrast_of_a_conversation_is_another_last_turn(tmp_path, chatty):
    file = lines(tmp_path, {"name": "x", "messages": TALK, "contrast": "A cat."})
    (query,) = load_queries(file, chatty, bos=True, context=512)
    assert query.contrast == "A cat. [end]"
    assert chatty.decode(query.contrast_tokens) == chatty.decode(
        chatty("A cat. [end]", add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": "hello"}, r"q\.jsonl:1: 'messages' holds a str; a list of messages"),
        ({"messages": []}, r"'messages' holds nothing"),
        ({"messages": [{"role": "user"}]}, r"message 1 of 'messages' is .* is wanted"),
        ({"messages": ASKED}, r"last message has the role 'user'; .*add it, or 'generate': 32"),
        ({"messages": TALK, "prompt": "x"}, r"has 'messages' and 'prompt'; take one"),
        ({"messages": TALK, "completion": "x"}, r"has 'messages' and 'completion'"),
        ({"messages": TALK, "generate": 4}, r"last message is the assistant's, and 'generate'"),
        ({"messages": TALK, "contrast": "A little girl."}, r"the contrast is the completion"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": ""}]},
            r"the assistant's last message is empty",
        ),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        check_queries(lines(tmp_path, {"name": "x"} | line))


def test_a_conversation_wants_a_template(tmp_path, tokenizer):
    file = lines(tmp_path, {"name": "x", "messages": TALK})
    with pytest.raises(ValueError, match=r"q\.jsonl:1: messages want a chat template"):
        load_queries(file, tokenizer, bos=True, context=512)


# --- completions that the model writes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, r"no 'completion'; .*\(or 'generate': 32, for .* own greedy completion"),
        ({"prompt": "x", "completion": "y", "generate": 3}, r"'completion' and 'generate'; take"),
        ({"prompt": "x", "generate": 0}, r"'generate' holds 0; a number of tokens is wanted"),
        ({"prompt": "x", "generate": True}, r"'generate' holds True"),
        ({"prompt": "x", "generate": "3"}, r"'generate' holds '3'"),
        ({"generate": 3}, r"no 'prompt'"),
    ],
)
def test_what_is_to_be_generated_is_said_in_one_way(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        check_queries(lines(tmp_path, {"name": "x"} | line))


def test_a_prompt_with_no_room_to_go_on_says_by_how_much(tmp_path, tokenizer):
    file = lines(tmp_path, {"name": "x", "prompt": LILY["prompt"], "generate": 510})
    length = 1 + len(tokenizer(LILY["prompt"], add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=rf"{length} tokens long, and 510 more .*: {length - 2} "):
        load_queries(file, tokenizer, True, 512, lambda name, tokens, n: "never asked")
    with pytest.raises(ValueError, match=r"leaves its completion to the model, and there is none"):
        load_queries(file, tokenizer, bos=True, context=None)


def test_a_model_that_says_nothing_is_an_error(tmp_path, tokenizer):
    file = lines(tmp_path, {"name": "x", "prompt": LILY["prompt"], "generate": 5})
    with pytest.raises(ValueError, match=r"q\.jsonl:1: the model says nothing after the prompt"):
        load_queries(file, tokenizer, True, 512, lambda name, tokens, n: "")


def test_a_contrast_that_the_model_writes_itself_is_an_error(tmp_path, tokenizer):
    line = LILY | {"completion": None, "generate": 5, "contrast": " little girl."}
    with pytest.raises(ValueError, match=r"contrast of query 'lily' is what the model writes"):
        load_queries(
            lines(tmp_path, line), tokenizer, True, 512, lambda name, tokens, n: " little girl."
        )


def test_a_character_that_is_cut_off_is_left_out(tokenizer):
    prompt = tokenizer("I am", add_special_tokens=False)["input_ids"]
    smile = tokenizer("I am 🙂", add_special_tokens=False)["input_ids"][len(prompt) :]
    assert continuation_text(tokenizer, prompt, smile) == " 🙂"
    assert continuation_text(tokenizer, prompt, smile[:-1]) == " "
    assert continuation_text(tokenizer, prompt, []) == ""


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """A run with one given completion and two that the model writes, one of a conversation."""
    root = tmp_path_factory.mktemp("generated")
    shutil.copytree(MODEL, root / "model", copy_function=shutil.copyfile)
    (root / "model/chat_template.jinja").write_text(TEMPLATE)
    write_lines(root / "corpus.jsonl", [{"id": str(n), "text": f"Lily {n}."} for n in range(9)])
    own = {"name": "own", "prompt": LILY["prompt"], "generate": 7, "tags": ["a", "b"]}
    write_lines(
        root / "queries.jsonl", [LILY, own, {"name": "chat", "messages": ASKED, "generate": 3}]
    )
    sections = {"train": {"checkpoint": {"path": "model"}}}
    for name, module in {"train": train, "tokenize": tokenize, "filter": filter}.items():
        run_stage(root, name, module, **sections)
    return root


def test_the_models_own_completion_is_its_greedy_one(generated, monkeypatch):
    context = stage_context(generated, "query", train={"checkpoint": {"path": "model"}})
    reference = read_reference(context.artifact("train"), generated)
    given, own, chat = queries_of(context, reference)
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, "cpu", query.torch.float32)
    expected = generate_greedy(model, own.prompt_tokens, 7, boundary_token(tokenizer, "eos"))
    assert own.completion_tokens == tuple(expected)
    assert own.completion.startswith(" ")
    assert tokenizer.decode([*own.prompt_tokens[1:], *expected]) == own.prompt + own.completion
    assert (given.is_generated, own.is_generated, chat.is_generated) == (False, True, True)
    assert chat.prompt == "[user] Who is Lily? [end]\n[assistant] "
    # A shard of the stage reads what was written, and asks no model again.
    assert set(store.read_json(context.work / COMPLETIONS)) == {"own", "chat"}
    monkeypatch.setattr("tasks.generated.generate_greedy", None)
    assert queries_of(context, reference) == [given, own, chat]


def test_the_prepared_queries_tell_what_was_generated_and_the_tags(generated):
    context = stage_context(generated, "query", train={"checkpoint": {"path": "model"}})
    reference = query.PassReference.of(context)
    given, own, _ = query.describe(queries_of(context, reference.model), reference)
    assert "generated" not in given
    assert (own["generated"], own["tags"]) == (True, ["a", "b"])
    probability = own["log_probability"]
    assert isinstance(probability, float)
    assert probability < 0


# --- tags and what is expected -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tags": "facts"}, r"q\.jsonl:1: 'tags' holds 'facts'; a list of words is wanted"),
        ({"tags": ["a", 3]}, r"'tags' holds"),
        ({"tags": ["a", " "]}, r"'tags' holds"),
        ({"tags": ["a", "b", "a"]}, r"'tags' names 'a' twice"),
        ({"expected": "ts-1"}, r"'expected' holds 'ts-1'; a list of ids"),
        ({"expected": []}, r"'expected' holds '\[\]'"),
        ({"expected": [3]}, r"'expected' names '3'; a list of ids"),
        ({"expected": [{}]}, r"'expected' names '\{\}'"),
    ],
)
def test_bad_tags_and_expectations_are_named_by_file_and_line(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        check_queries(lines(tmp_path, LILY | fields))


def test_null_is_the_same_as_nothing(tmp_path, tokenizer):
    nothing = dict.fromkeys(("contrast", "tags", "expected", "messages", "generate"))
    (query,) = load_queries(lines(tmp_path, LILY | nothing), tokenizer, True, 512)
    (plain,) = load_queries(lines(tmp_path, LILY), tokenizer, True, 512)
    assert query == plain
