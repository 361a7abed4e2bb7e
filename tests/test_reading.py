"""A corpus is read once: a byte of it is asked for once, whatever the format and the shards."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import faraway, reading, store, tokenize, train
from tasks.corpora import Corpus, documents, read_all
from tasks.faraway import check_record, far_files, write_record
from tests.farserver import Served, file_server
from tests.small_run import SECTIONS, run_stage, stage_context

BLOCK = 1 << 13  # bytes that are asked for at once
# Of a story's text, half is noise, so that compressed files too are many blocks long.
STORIES = [
    {"id": f"s{n}", "text": f"Once upon a time {n}. " + f"{pow(7, 900 + n, 1 << 2048):x}"}
    for n in range(240)
]
EXACT = ("jsonl", "jsonl.gz", "jsonl.zst", "arrow")
FILES = ("tokens.safetensors", "sequences.parquet", "documents.parquet")


def content(kind: str, stories: list[dict[str, str]]) -> bytes:
    """A file of stories."""
    lines = "".join(json.dumps(story) + "\n" for story in stories).encode()
    if kind.startswith("jsonl"):
        zst = bytes(pa.compress(lines, "zstd", asbytes=True))
        return {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zst}[kind]
    buffer, table = io.BytesIO(), pa.Table.from_pylist(stories)
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=16)
    else:
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=16)
    return buffer.getvalue()


@pytest.fixture
def served(monkeypatch) -> Iterator[Served]:
    monkeypatch.setattr(faraway, "BLOCK", BLOCK)
    with file_server() as server:
        yield server


def put(served: Served, kind: str, num_files: int) -> None:
    """The stories, parted into files below /c/."""
    served.files.clear()
    size = -(-len(STORIES) // num_files)
    parts = [STORIES[at : at + size] for at in range(0, len(STORIES), size)]
    for number, part in enumerate(parts):
        served.files[f"/c/{number}.{kind}"] = content(kind, part)
    if kind == "arrow":
        named = [{"filename": f"{number}.arrow"} for number in range(len(parts))]
        served.files["/c/state.json"] = json.dumps({"_data_files": named}).encode()


def sections(url: str, shards: int = 3, **train_section: Any) -> dict[str, Any]:
    return {
        "corpus": SECTIONS["corpus"] | {"path": url},
        "runtime": SECTIONS["runtime"] | {"shards": shards},
        "tokenize": SECTIONS["tokenize"] | {"context": 32},
        **train_section,
    }


def tokenized(root: Path, url: str, shards: int = 3) -> dict[str, str]:
    """Digests of what a run makes of it."""
    root.mkdir(exist_ok=True)
    given = sections(url, shards)
    if "://" in url:
        write_record(root, url)
    run_stage(root, "train", train, **given)
    folder = run_stage(root, "tokenize", tokenize, **given)
    return {name: store.digest(folder / name) for name in FILES}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """What a run makes of the same stories in one file on this machine."""
    root = tmp_path_factory.mktemp("near")
    (root / "corpus.jsonl").write_bytes(content("jsonl", STORIES))
    return tokenized(root, "corpus.jsonl", shards=1)


@pytest.mark.parametrize("kind", [*EXACT, "parquet"])
def test_every_byte_is_asked_for_once_and_the_result_is_that_of_a_near_file(
    served, tmp_path, expected, kind
):
    for num_files in (1, 4):
        put(served, kind, num_files)
        served.sent.clear()
        assert tokenized(tmp_path / str(num_files), f"{served.url}/c/") == expected
        for name, held in served.files.items():
            if name.endswith(kind):
                assert len(held) > BLOCK
                # Where a parquet file's columns are stands at its end, which is read first.
                extra = 0 if kind in EXACT else 1 << 16
                assert len(held) <= served.sent[name] <= len(held) + extra


def test_a_model_that_is_trained_here_reads_its_corpus_once_too(served, tmp_path):
    put(served, "jsonl", 2)
    write_record(tmp_path, f"{served.url}/c")
    small = {"architecture": "gpt2", "width": 8, "layers": 1, "heads": 2, "vocabulary": 300}
    small |= {"context": 32, "steps": 1, "batch": 1, "learning_rate": 1e-2, "seed": 0}
    run_stage(tmp_path, "train", train, **sections(f"{served.url}/c", train={"scratch": small}))
    assert {name: served.sent[name] for name in served.files} == {
        name: len(held) for name, held in served.files.items()
    }


@pytest.mark.parametrize("bounds", [(0, 7), (0, 3), (2, 5), (3, 4), (6, 7)])
def test_any_range_of_documents_is_found_across_files_groups_and_empty_files(
    tmp_path, monkeypatch, bounds
):
    monkeypatch.setattr(reading, "DOCUMENTS_AT_ONCE", 2)
    talk = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "\n\u2028"}]
    stories = [{"id": str(n), "messages": talk, "n": n, "of": [1.5, None]} for n in range(7)]
    parts = {"a": stories[:3], "b": [], "c": stories[3:4], "d": stories[4:]}
    (tmp_path / "corpus").mkdir()
    for name, part in parts.items():
        text = "".join(json.dumps(each) + "\n" for each in part)
        (tmp_path / "corpus" / f"{name}.jsonl").write_text(text)
    given = {"path": "corpus", "messages": "messages", "id": "id", "limit": None}
    context = stage_context(tmp_path, "tokenize", corpus=given)
    corpus = Corpus.of(context.params.corpus, tmp_path)
    read = reading.read_corpus(context, corpus)
    assert reading.num_read(read) == 7
    start, stop = bounds
    found = [each for some in reading.documents_read(read, start, stop) for each in some]
    assert found == list(documents(corpus))[start:stop]


def test_two_documents_of_one_name_in_two_files_and_a_limit_across_them(tmp_path):
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"id": str(n), "text": "x"}) for n in range(3)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("\n".join(lines))

    def read(limit: int | None) -> int:
        given = SECTIONS["corpus"] | {"path": "corpus", "limit": limit}
        context = stage_context(tmp_path, "tokenize", corpus=given)
        corpus = Corpus.of(context.params.corpus, tmp_path)
        return reading.num_read(reading.read_corpus(context, corpus))

    assert read(3) == 3
    for limit in (4, None):
        with pytest.raises(ValueError, match=r"b\.jsonl:1: document id '0' was .* at a\.jsonl:1"):
            read(limit)


# --- over HTTP -----------------------------------------------------------------------------------


def test_a_folder_over_http_is_described_by_sizes_and_checksums_and_a_change_is_named(
    served, tmp_path
):
    put(served, "jsonl", 2)
    served.files["/c/deeper/2.jsonl"] = content("jsonl", [{"id": "x", "text": "y"}])
    url = f"{served.url}/c/"
    listed = far_files(url)
    assert [name for name, _ in listed] == ["0.jsonl", "1.jsonl", "deeper/2.jsonl"]
    assert [file.size for _, file in listed] == [len(held) for held in served.files.values()]
    assert all(file.checksum.startswith("etag:") for _, file in listed)
    write_record(tmp_path, url)
    assert check_record(tmp_path, url)["num_bytes"] == sum(map(len, served.files.values()))
    assert len(read_all(Corpus(url, id="id"))) == len(STORIES) + 1
    served.files["/c/1.jsonl"] = served.files["/c/1.jsonl"].replace(b"Once", b"ONCE")
    with pytest.raises(ValueError, match=r"1\.jsonl is .* the corpus changed; run `python -m"):
        check_record(tmp_path, url)


def test_of_one_file_over_http_the_head_is_enough_to_describe_it(served, tmp_path):
    put(served, "jsonl.gz", 1)
    url = f"{served.url}/c/0.jsonl.gz"
    [(name, file)] = far_files(url)
    assert (name, file.size) == ("0.jsonl.gz", len(served.files["/c/0.jsonl.gz"]))
    assert not served.sent
    assert [d.place for d in documents(Corpus(url, limit=2))] == ["0.jsonl.gz:1", "0.jsonl.gz:2"]


def test_what_goes_wrong_over_http_is_named_with_the_url(served):
    put(served, "jsonl", 1)
    for path, message in (
        ("/none.jsonl", r"/none\.jsonl: .*; .+"),
        ("/none/", r"/none/: .*; .+"),
    ):
        with pytest.raises(ValueError, match=message):
            read_all(Corpus(f"{served.url}{path}"))
    served.ranges = False
    with pytest.raises(ValueError, match=r"/c/0\.jsonl: cannot be read .*range requests.*; .+"):
        read_all(Corpus(f"{served.url}/c/0.jsonl"))
    gone = "http://127.0.0.1:9/c/0.jsonl"
    with pytest.raises(ValueError, match=rf"{gone}: .* or it cannot be reached; .+"):
        read_all(Corpus(gone))
