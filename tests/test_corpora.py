"""Corpora and query sets: what is read, and how every fault is named by file and line."""

import gzip
import json
from pathlib import Path

import pytest

from tasks.corpora import Corpus, documents, survey
from tasks.models import load_tokenizer
from tasks.querysets import check_queries, load_queries

MODEL = Path(__file__).parents[1] / "data/models/stories260K"


def write_lines(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def corpus(path: Path, id: str | None = "id", limit: int | None = None) -> Corpus:
    return Corpus(path, text="text", id=id, limit=limit)


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
    assert survey(corpus(tmp_path)) == 3


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


def test_ranges_join_into_the_whole_corpus(tmp_path):
    write_lines(tmp_path / "1.jsonl", *STORIES[:2])
    write_lines(tmp_path / "2.jsonl", STORIES[2])
    source = corpus(tmp_path)
    assert [d.id for d in documents(source, 0, 1)] + [d.id for d in documents(source, 1, 3)] == [
        "a",
        "b",
        "c",
    ]


def test_limit_reads_only_the_first_documents(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", *STORIES, "this line is never reached")
    assert survey(corpus(file, limit=2)) == 2
    assert [d.id for d in documents(corpus(file, limit=2), 1, 3)] == ["b"]


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
        survey(corpus(file))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": "a", "text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: not UTF-8"):
        survey(corpus(file))


def test_empty_corpus_absent_path_folder_without_lines_and_broken_gzip_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.path: .*empty\.jsonl holds no documents"):
        survey(corpus(write_lines(tmp_path / "empty.jsonl", "", "  ")))
    with pytest.raises(ValueError, match=r"absent: no such file or folder"):
        survey(corpus(tmp_path / "absent"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no file in this folder ends in \.jsonl"):
        survey(corpus(tmp_path / "folder"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read"):
        survey(corpus(tmp_path / "cut.jsonl.gz"))


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
    assert query.extra == {"tags": ["names"]}
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
