"""The embedded model, stories and queries are what data/README.md says of them."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.querysets import load_queries

FIELDS = {"name", "prompt", "completion", "source", "category", "note"}
EMBEDDED = ("models", "tinystories", "uci", "mnist", "wikipedia", "dialogue")
CATEGORISED = ("tinystories", "smoke")  # queries without tags
STORIES = {"first1000": 1000, "val_slice": 3117, "test_slice": 3118}


def json_lines(path: Path) -> list[dict]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tokenizer(root: Path):
    return AutoTokenizer.from_pretrained(root / "data/models/stories260K")


@pytest.fixture(scope="module")
def model(root: Path):
    return AutoModelForCausalLM.from_pretrained(root / "data/models/stories260K").eval()


@pytest.fixture(scope="module")
def chatty(root: Path):
    """The same tokenizer with a template for conversations."""
    tokenizer = AutoTokenizer.from_pretrained(root / "data/models/stories260K")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def encoded(tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]


def test_every_embedded_file_has_the_checksum_of_the_readme(root: Path):
    data = root / "data"
    row = re.compile(
        rf"^\| `((?:{'|'.join(EMBEDDED)})/\S+)` \| ([\d,]+) \| `([0-9a-f]{{64}})` \|", re.MULTILINE
    )
    listed = {
        name: digest for name, _, digest in row.findall((data / "README.md").read_text("utf-8"))
    }
    files = [p for folder in EMBEDDED for p in (data / folder).rglob("*") if p.is_file()]
    found = {
        p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }
    assert found == listed


def test_stories_have_an_id_of_their_own_and_text(root: Path):
    stories = {name: json_lines(root / f"data/tinystories/{name}.jsonl.gz") for name in STORIES}
    assert {name: len(rows) for name, rows in stories.items()} == STORIES
    rows = [row for part in stories.values() for row in part]
    assert all(row["text"].strip() for row in rows)
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)


def test_articles_name_their_page_and_conversations_end_with_an_answer(root: Path):
    articles = json_lines(root / "data/wikipedia/core.jsonl.gz")
    assert len({row["id"] for row in articles}) == len(articles) == 178
    assert all(row["url"].startswith("https://en.wikipedia.org/") for row in articles)
    assert all(row["title"] and row["text"].strip() for row in articles)
    conversations = json_lines(root / "data/dialogue/dolly.jsonl.gz")
    assert len({row["id"] for row in conversations}) == len(conversations) == 504
    assert {tuple(turn["role"] for turn in row["messages"]) for row in conversations} == {
        ("user", "assistant")
    }


@pytest.mark.parametrize(("name", "rows", "columns"), [("concrete", 1030, 9), ("energy", 768, 9)])
def test_tables_are_finite_numbers(root: Path, name: str, rows: int, columns: int):
    lines = gzip.decompress((root / f"data/uci/{name}/data.csv.gz").read_bytes()).decode().split()
    numbers = torch.tensor([[float(number) for number in line.split(",")] for line in lines])
    assert numbers.shape == (rows, columns)
    assert numbers.isfinite().all()


def test_mnist_is_ten_thousand_labelled_images(root: Path):
    folder = root / "data/mnist"
    images = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    sizes = [int.from_bytes(images[at : at + 4], "big") for at in (4, 8, 12)]
    assert sizes == [10_000, 28, 28]
    assert len(images) == 16 + 10_000 * 28 * 28
    assert len(labels) == 8 + 10_000
    assert list(labels[8:18]) == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as MNIST is known to begin


@pytest.mark.parametrize("name", CATEGORISED)
def test_queries_are_complete_and_their_names_differ(root: Path, name: str):
    queries = json_lines(root / f"data/queries/{name}.jsonl")
    assert all(set(query) == FIELDS and all(query.values()) for query in queries)
    assert len({query["name"] for query in queries}) == len(queries)
    assert {query["source"] for query in queries} <= {"model greedy", "human"}


def test_every_pack_of_queries_is_one_that_we_read(root: Path, tokenizer, chatty):
    """By our own reader, and its licence stands in the README; typed queries have no source."""
    files = sorted((root / "data/queries").glob("*.jsonl"))
    packs = [file for file in files if "source" in json_lines(file)[0]]
    readme = (root / "data/README.md").read_text("utf-8")
    row = re.compile(r"^\| `queries/(\w+)\.jsonl` \| (\d+) \| .* \| (.+) \|$", re.MULTILINE)
    rows = row.findall(readme)
    assert sorted(name for name, _, _ in rows) == [pack.stem for pack in packs]
    licences = r"Apache-2\.0|MIT|CC BY|arXiv|as `facts"
    assert all(re.search(licences, licence) for _, _, licence in rows)
    for name, count, _ in rows:
        pack = root / f"data/queries/{name}.jsonl"
        queries = load_queries(pack, chatty, True, 1500)
        assert len(queries) == int(count)
        assert pack.stat().st_size <= 60_000
        assert all(re.fullmatch(r"[a-z0-9][a-z0-9_]*", query.name) for query in queries)
        if name not in CATEGORISED:
            assert all(query.tags and query.extra["source"] for query in queries)
    both = load_queries(root / "data/queries/reversed_facts.jsonl", tokenizer, True, None)
    for fact, other in zip(both[::2], both[1::2], strict=True):
        assert fact.extra["pair"] == other.extra["pair"]
        assert (fact.tags[0], other.tags[0]) == ("forward", "reversed")
        assert fact.completion.strip(" .") in other.prompt
        assert other.completion.strip(" .") in fact.prompt


@pytest.mark.parametrize(
    ("name", "corpus"),
    [("wikipedia", "wikipedia/core.jsonl.gz"), ("chat", "dialogue/dolly.jsonl.gz")],
)
def test_what_queries_expect_is_in_the_corpus(root: Path, name: str, corpus: str):
    held = json_lines(root / "data" / corpus)
    ids, titles = {str(each["id"]) for each in held}, {each.get("title") for each in held}
    for query in json_lines(root / f"data/queries/{name}.jsonl"):
        for each in query["expected"]:
            assert each in ids if isinstance(each, str) else each["title"] in titles, query


def test_the_model_is_stories260K(model, tokenizer):
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert model.dtype == torch.float32
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    start = torch.tensor([encoded(tokenizer, "")])
    text = tokenizer.decode(model.generate(start, max_new_tokens=80, do_sample=False)[0][1:])
    assert text.startswith(story)


def test_a_prompts_tokens_begin_those_of_prompt_and_completion(root: Path, tokenizer):
    """Else the completion would have no first token of its own."""
    for query in json_lines(root / "data/queries/tinystories.jsonl"):
        prompt = encoded(tokenizer, query["prompt"])
        whole = encoded(tokenizer, query["prompt"] + query["completion"])
        assert whole[: len(prompt)] == prompt
        assert len(whole) > len(prompt)


def test_greedy_completions_are_the_models_own(root: Path, model, tokenizer):
    for query in json_lines(root / "data/queries/tinystories.jsonl"):
        prompt = encoded(tokenizer, query["prompt"])
        length = len(encoded(tokenizer, query["prompt"] + query["completion"])) - len(prompt)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)[0]
        continuation = tokenizer.decode(out, skip_special_tokens=True)[len(query["prompt"]) :]
        assert (continuation == query["completion"]) == (query["source"] == "model greedy"), query
