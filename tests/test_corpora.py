"""Corpora and query sets: what is read, and how every fault is named by file and line."""

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpora import Corpus, documents, read_all
from tasks.models import load_tokenizer
from tasks.querylines import check_queries
from tasks.querysets import load_queries
from tasks.records import data_files

MODEL = Path(__file__).parents[1] / "data/models/stories260K"


def write_lines(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def corpus(path: Path, id: str | None = "id", limit: int | None = None) -> Corpus:
    return Corpus(path, id=id, limit=limit)


PAIR, CHAT = {"prompt": "q", "completion": "a"}, {"messages": "m"}
STORIES = [
    {"id": "a", "text": "One.", "author": "Ann"},
    {"id": "b", "text": "Two.", "year": 1999},
    {"id": "c", "text": "Three."},
]


def test_documents_carry_id_text_and_the_other_fields(tmp_path):
    found = list(documents(corpus(write_lines(tmp_path / "x.jsonl", *STORIES))))
    assert [(d.id, d.text) for d in found] == [("a", "One."), ("b", "Two."), ("c", "Three.")]
    assert [d.metadata for d in found] == [{"author": "Ann"}, {"year": 1999}, {}]


def test_folder_is_read_in_sorted_order_plain_or_compressed(tmp_path):
    with gzip.open(tmp_path / "2.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(STORIES[2]))
    write_lines(tmp_path / "1.jsonl", STORIES[0], "", "   ", STORIES[1])
    (tmp_path / "README.md").write_text("not a corpus")
    assert [d.id for d in documents(corpus(tmp_path))] == ["a", "b", "c"]
    assert len(read_all(corpus(tmp_path))) == 3


def test_unnamed_documents_are_named_by_file_and_line(tmp_path):
    write_lines(tmp_path / "x.jsonl", STORIES[0], "", STORIES[1])
    assert [d.id for d in documents(corpus(tmp_path, id=None))] == ["x.jsonl:1", "x.jsonl:3"]


def test_numbers_serve_as_ids_and_a_byte_order_mark_is_passed_over(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 7, "text": "x"}\r\n')
    assert [d.id for d in documents(corpus(file))] == ["7"]


def test_nan_in_metadata_becomes_null(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", '{"id": "a", "text": "x", "score": NaN}')
    assert next(documents(corpus(file))).metadata == {"score": None}


def test_files_join_into_the_whole_corpus(tmp_path):
    write_lines(tmp_path / "1.jsonl", *STORIES[:2])
    write_lines(tmp_path / "2.jsonl", STORIES[2])
    source, files = corpus(tmp_path), data_files(tmp_path)
    assert [[d.id for d in documents(source, [file])] for file in files] == [["a", "b"], ["c"]]


def test_limit_reads_only_the_first_documents(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", *STORIES, "this line is never reached")
    assert len(read_all(corpus(file, limit=2))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'id': 1}", r"x\.jsonl:3: not JSON \(.+column 2\): \"\{'id': 1\}\""),
        ("[1, 2]", r"x\.jsonl:3: a JSON list; one JSON object a line is wanted"),
        (
            {"id": "d", "body": "x"},
            r"x\.jsonl:3: no field 'text', which corpus\.text names; fields there: 'id', 'body'",
        ),
        ({"id": "d", "text": 5}, r"x\.jsonl:3: field 'text' \(corpus\.text\) holds a int"),
        ({"text": "x"}, r"x\.jsonl:3: no field 'id', which corpus\.id names"),
        ({"id": ["d"], "text": "x"}, r"x\.jsonl:3: field 'id' .* a string or a whole number"),
        (
            {"id": "a", "text": "x"},
            r"x\.jsonl:3: document id 'a' was already used at x\.jsonl:1",
        ),
        ('{"id": "d", "text": "\\ud83d"}', r"x\.jsonl:3: not UTF-8 text"),
    ],
)
def test_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    # The blank line counts: the number is the one an editor shows.
    file = write_lines(tmp_path / "x.jsonl", STORIES[0], "", line)
    with pytest.raises(ValueError, match=message):
        read_all(corpus(file))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": "a", "text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: not UTF-8"):
        read_all(corpus(file))


def test_empty_corpus_absent_path_folder_without_lines_and_broken_gzip_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.path: .*empty\.jsonl holds no documents"):
        read_all(corpus(write_lines(tmp_path / "empty.jsonl", "", "  ")))
    with pytest.raises(ValueError, match=r"absent: no such file or folder"):
        read_all(corpus(tmp_path / "absent"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no file in this folder ends in one of \.jsonl"):
        read_all(corpus(tmp_path / "folder"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read"):
        read_all(corpus(tmp_path / "cut.jsonl.gz"))


# --- files of other kinds ------------------------------------------------------------------------


def zst(path: Path, content: bytes) -> Path:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)
    return path


def test_all_formats_give_the_same_documents(tmp_path):
    lines = "".join(json.dumps(story) + "\n" for story in STORIES).encode()
    files = [tmp_path / "x.jsonl", zst(tmp_path / "x.jsonl.zst", lines), tmp_path / "x.parquet"]
    files[0].write_bytes(lines)
    table = pa.Table.from_pylist([{"author": None, "year": None} | story for story in STORIES])
    pq.write_table(table, files[2])
    saved = tmp_path / "saved"
    saved.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table[:1], table[1:]), strict=True):
        with pa.ipc.new_stream(saved / name, table.schema) as writer:
            writer.write_table(part)
    (saved / "cache-0123.arrow").write_bytes(b"not of the dataset")
    state = {"_data_files": [{"filename": name} for name in names]}
    (saved / "state.json").write_text(json.dumps(state))
    for path in (*files, saved):
        found = list(documents(corpus(path)))
        assert [(d.id, d.text) for d in found] == [(s["id"], s["text"]) for s in STORIES]
        assert found[0].metadata["author"] == "Ann"
    assert [d.place for d in documents(corpus(files[2]))] == [f"x.parquet:{n}" for n in (1, 2, 3)]


def test_of_a_folder_all_formats_are_read(tmp_path):
    write_lines(tmp_path / "1.jsonl", STORIES[0])
    pq.write_table(pa.Table.from_pylist(STORIES[1:2]), tmp_path / "2.parquet")
    assert [d.text for d in documents(corpus(tmp_path, id=None))] == ["One.", "Two."]
    (tmp_path / "LICENSE.txt").write_text("no story")
    with pytest.raises(ValueError, match=r"plain text \(LICENSE\.txt\) beside records \(1\.json"):
        read_all(corpus(tmp_path, id=None))


def test_texts_of_a_folder_are_a_document_each(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name[0])
    assert [(d.id, d.text) for d in documents(Corpus(tmp_path))] == [("a.txt", "a"), ("b.txt", "b")]


def test_dates_and_bytes_of_a_table_become_text(tmp_path):
    row = {"id": "a", "text": "x", "when": datetime.date(2020, 1, 2), "nan": float("nan")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (found,) = documents(corpus(tmp_path / "x.parquet"))
    assert found.metadata == {"when": "2020-01-02", "nan": None}


def test_a_text_is_one_document_or_those_between_separators(tmp_path, monkeypatch):
    file = tmp_path / "x.txt"
    file.write_text("One.\nMore é.\n<|end|>\n\nTwo.<|end|>\n  <|end|>Three.\n", "utf-8")
    (whole,) = documents(Corpus(file))
    assert (whole.id, whole.text) == ("x.txt", file.read_text("utf-8"))
    for chunk in (1, 3, 1 << 20):  # a separator or a letter across the bounds of a chunk
        monkeypatch.setattr("tasks.records.CHUNK", chunk)
        found = list(documents(Corpus(file, separator="<|end|>")))
        assert [d.text.strip() for d in found] == ["One.\nMore é.", "Two.", "Three."]
        assert [d.id for d in found] == ["x.txt:1", "x.txt:5", "x.txt:6"]
    zst(tmp_path / "y.txt.zst", file.read_bytes())
    assert [d.text for d in documents(Corpus(tmp_path / "y.txt.zst", separator="<|end|>"))] == [
        d.text for d in found
    ]


def test_files_that_are_not_what_they_are_called_are_named(tmp_path):
    cases = {
        "x.parquet": r"x\.parquet: no complete parquet file",
        "x.jsonl.zst": r"x\.jsonl\.zst: cannot be read",
        "x.txt": r"x\.txt: not UTF-8 text",
        "x.csv": r"x\.csv: a file that ends in one of \.jsonl, \.txt, \.parquet",
        "x.parquet.gz": r"x\.parquet\.gz: a file that ends in",
    }
    for name, message in cases.items():
        (tmp_path / name).write_bytes(b"\xff\xfe rubbish")
        with pytest.raises(ValueError, match=message):
            read_all(corpus(tmp_path / name))


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several splits \(test, train\); give one, such as"):
        read_all(corpus(tmp_path))


@pytest.mark.parametrize(
    ("keys", "line", "message"),
    [
        (PAIR, {"q": "x"}, r"no field 'a', which corpus\.completion names"),
        (PAIR, {"q": 3, "a": "x"}, r"field 'q' \(corpus\.prompt\) holds a int"),
        (PAIR, {"q": "x", "a": ""}, r"the completion is empty"),
        (CHAT, {"m": []}, r"field 'm' \(corpus\.messages\) holds nothing; a list of messages"),
        (CHAT, {"m": "hello"}, r"holds a str; a list of messages"),
        (CHAT, {"m": [{"role": "user"}]}, r"message 1 of field 'm'"),
        (
            CHAT,
            {"m": [{"role": "user", "content": "x"}]},
            r"no message .* has the role 'assistant'",
        ),
    ],
)
def test_a_bad_pair_or_conversation_is_named_by_file_and_line(tmp_path, keys, line, message):
    file = write_lines(tmp_path / "x.jsonl", line)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*" + message):
        read_all(Corpus(file, keys))


# --- queries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


LILY = {"name": "lily", "prompt": "Once upon a time, there was a", "completion": " little girl."}


def test_query_splits_into_prompt_and_completion_without_losing_a_token(tmp_path, tokenizer):
    file = write_lines(tmp_path / "q.jsonl", LILY | {"tags": ["names"]})
    (query,) = load_queries(file, tokenizer, bos=True, context=512)
    whole = tokenizer(LILY["prompt"] + LILY["completion"], add_special_tokens=False)["input_ids"]
    assert query.prompt_tokens[0] == tokenizer.bos_token_id
    assert [*query.prompt_tokens[1:], *query.completion_tokens] == whole
    assert tokenizer.decode(query.completion_tokens) in {" little girl.", "little girl."}
    assert (query.tags, query.extra) == (("names",), {})
    (plain,) = load_queries(file, tokenizer, bos=False, context=512)
    assert plain.prompt_tokens == query.prompt_tokens[1:]


def test_token_across_the_border_belongs_to_the_completion(tmp_path, tokenizer):
    # "▁time" is one token: cut in the middle of it, all of it is the completion.
    file = write_lines(
        tmp_path / "q.jsonl", {"name": "x", "prompt": "Once upon a ti", "completion": "me, there"}
    )
    (query,) = load_queries(file, tokenizer, bos=False, context=512)
    assert tokenizer.convert_ids_to_tokens(query.completion_tokens[0]) == "▁time"
    assert tokenizer.decode(query.prompt_tokens) == "Once upon a"


def test_emoji_of_several_tokens_stays_whole(tmp_path, tokenizer):
    file = write_lines(tmp_path / "q.jsonl", {"name": "x", "prompt": "I am", "completion": "🙂"})
    (query,) = load_queries(file, tokenizer, bos=True, context=512)
    assert tokenizer.convert_ids_to_tokens(query.completion_tokens) == [
        "<0xF0>",
        "<0x9F>",
        "<0x99>",
        "<0x82>",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LILY | {"name": "b", "completion": ""}, r"q\.jsonl:2: the query's completion is empty"),
        (LILY | {"name": "b", "prompt": ""}, r"q\.jsonl:2: the query's prompt is empty"),
        (LILY, r"q\.jsonl:2: the name 'lily' was already used at q\.jsonl:1"),
        (
            {"name": "b", "prompt": "x", "answer": "y"},
            r"q\.jsonl:2: the query has no 'completion'; fields there: 'name', 'prompt', 'answer'",
        ),
        (LILY | {"name": "b", "prompt": None}, r"q\.jsonl:2: 'prompt' holds a NoneType"),
        ("{", r"q\.jsonl:2: not JSON"),
    ],
)
def test_bad_query_is_named_by_file_and_line_before_any_tokenizer(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        check_queries(write_lines(tmp_path / "q.jsonl", LILY, line))


def test_query_longer_than_the_context_says_by_how_much(tmp_path, tokenizer):
    file = write_lines(tmp_path / "q.jsonl", LILY)
    (query,) = load_queries(file, tokenizer, bos=True, context=512)
    length = len(query.prompt_tokens) + len(query.completion_tokens)
    assert len(load_queries(file, tokenizer, bos=True, context=length)) == 1
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: .* is {length} tokens long .*2 more than"):
        load_queries(file, tokenizer, bos=True, context=length - 2)


def test_prompt_that_has_no_token_of_its_own_is_an_error(tmp_path, tokenizer):
    file = write_lines(tmp_path / "q.jsonl", {"name": "x", "prompt": "On", "completion": "ce"})
    with pytest.raises(ValueError, match=r"q\.jsonl:1: no token of query 'x' lies in the prompt"):
        load_queries(file, tokenizer, bos=True, context=512)


def test_doubled_bos_and_empty_query_sets_are_errors(tmp_path, tokenizer):
    file = write_lines(tmp_path / "q.jsonl", LILY | {"prompt": "<s>Once"})
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .* begins with the BOS token"):
        load_queries(file, tokenizer, bos=True, context=512)
    with pytest.raises(ValueError, match=r"query\.path: .* holds no queries"):
        check_queries(write_lines(tmp_path / "none.jsonl", ""))


def test_a_contrast_has_the_tokens_of_the_prompt_before_it(tmp_path, tokenizer):
    contrast = {"contrast": " big dog."}
    file = write_lines(tmp_path / "q.jsonl", LILY | contrast | {"tag": "x"})
    (query,) = load_queries(file, tokenizer, bos=True, context=512)
    (alone,) = load_queries(
        write_lines(tmp_path / "p.jsonl", LILY | {"completion": " big dog."}), tokenizer, True, 512
    )
    assert (query.prompt_tokens, query.contrast_tokens) == (
        alone.prompt_tokens,
        alone.completion_tokens,
    )
    assert (query.contrast, query.extra) == (" big dog.", {"tag": "x"})
    (none,) = load_queries(
        write_lines(tmp_path / "n.jsonl", LILY | {"contrast": None}), tokenizer, True, 512
    )
    assert (none.contrast, none.contrast_tokens) == ("", ())


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ("", r"q\.jsonl:1: the query's contrast is empty"),
        (3, r"q\.jsonl:1: 'contrast' holds a int"),
        (LILY["completion"], r"q\.jsonl:1: the contrast is the completion"),
        (" dog" * 600, r"q\.jsonl:1: query 'lily' is \d+ tokens long"),
        ("me, there", r"q\.jsonl:1: .* other tokens before its contrast"),
    ],
)
def test_a_bad_contrast_is_named_by_file_and_line(tmp_path, tokenizer, contrast, message):
    prompt = "Once upon a ti" if contrast == "me, there" else LILY["prompt"]
    file = write_lines(tmp_path / "q.jsonl", LILY | {"prompt": prompt, "contrast": contrast})
    with pytest.raises(ValueError, match=message):
        load_queries(file, tokenizer, bos=True, context=512)
