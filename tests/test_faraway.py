"""Corpora behind a URL: read as if they were here, described, and refused when they changed."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import active, store, tokenize, train
from tasks.corpora import Corpus, documents, read_all
from tasks.faraway import (
    _checksum,
    check_record,
    checked,
    far_files,
    is_far,
    record_of,
    write_record,
)
from tasks.params import RunParams
from tests.small_run import SECTIONS, run_stage, write_lines

SHA = "0123456789abcdef0123456789abcdef01234567"
STORIES = [{"id": f"s{n}", "text": f"Story {n}. Once upon a time."} for n in range(4)]
URL = "memory://bucket/corpus"


@pytest.fixture
def bucket() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def lines(stories: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(story) + "\n" for story in stories).encode()


def parquet(stories: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stories), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", lines(STORIES)),
        ("x.jsonl.gz", gzip.compress(lines(STORIES), mtime=0)),
        ("x.jsonl.zst", bytes(pa.compress(lines(STORIES), "zstd", asbytes=True))),
        ("x.parquet", parquet(STORIES)),
    ],
    ids=["jsonl", "jsonl.gz", "jsonl.zst", "parquet"],
)
def test_documents_of_every_format_stream_from_a_url(bucket, name: str, content: bytes) -> None:
    bucket.pipe(f"/bucket/corpus/{name}", content)
    for url in (URL, f"{URL}/{name}"):
        assert [d.id for d in documents(Corpus(url, id="id"))] == ["s0", "s1", "s2", "s3"]
    _, document, _, _ = documents(Corpus(URL))
    assert document.place == f"{name}:2"
    assert document.text == STORIES[1]["text"]


def test_a_file_system_whose_files_keep_nothing_is_read_too(bucket, monkeypatch) -> None:
    def plain(self, path, mode="rb", block_size=None):
        return io.BytesIO(self.store[path].getvalue())

    bucket.pipe("/bucket/corpus/x.jsonl", lines(STORIES))
    monkeypatch.setattr(type(bucket), "open", plain)
    assert len(read_all(Corpus(URL, id="id"))) == 4


def test_a_folder_is_read_in_the_order_of_its_names_below_it(bucket) -> None:
    bucket.pipe("/bucket/corpus/b/1.jsonl", lines(STORIES[2:]))
    bucket.pipe("/bucket/corpus/a.jsonl", lines(STORIES[:2]))
    bucket.pipe("/bucket/corpus/README.md", b"no corpus")
    assert len(read_all(Corpus(URL, id="id"))) == 4
    assert [d.id for d in documents(Corpus(URL))] == [
        "a.jsonl:1", "a.jsonl:2", "b/1.jsonl:1", "b/1.jsonl:2",
    ]  # fmt: skip


def test_a_saved_dataset_behind_a_url_is_read_in_the_order_of_its_state(bucket) -> None:
    for name, part in (("z.arrow", STORIES[:2]), ("a.arrow", STORIES[2:])):
        table, buffer = pa.Table.from_pylist(part), io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
        bucket.pipe(f"/bucket/corpus/{name}", buffer.getvalue())
    state = {"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}]}
    bucket.pipe("/bucket/corpus/state.json", json.dumps(state).encode())
    assert [d.id for d in documents(Corpus(URL, id="id"))] == ["s0", "s1", "s2", "s3"]


def test_a_fault_in_a_far_file_is_named_by_file_and_line(bucket) -> None:
    bucket.pipe("/bucket/corpus/x.jsonl", lines(STORIES[:1]) + b"{\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not JSON"):
        read_all(Corpus(URL))
    with pytest.raises(ValueError, match=r"memory://bucket/none: no such file or folder"):
        read_all(Corpus("memory://bucket/none"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/org/name/x.parquet", "full sha of a commit"),
        ("hf://datasets/org/name@main/x.parquet", "full sha of a commit"),
        (f"hf://datasets/org/name@{SHA[:12]}", "full sha of a commit"),
        (f"hf://org/model@{SHA}", "hf://datasets/organisation/name"),
        ("s3://key:secret@bucket/x", "may be a secret"),
        ("https://host/x.jsonl?token=secret", "may be a secret"),
        ("file://x.jsonl", "give the path itself"),
        (f"simplecache::hf://datasets/org/name@{SHA}", "give the path itself"),
    ],
)
def test_a_url_that_moves_or_tells_a_secret_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        checked(url)
    assert "secret@" not in str(refused.value)
    assert "token" not in str(refused.value)
    sections = SECTIONS | {"corpus": SECTIONS["corpus"] | {"path": url}}
    with pytest.raises(ValueError, match=message):
        RunParams.model_validate(sections)


@pytest.mark.parametrize("url", [f"hf://datasets/org/name@{SHA}/data", "s3://bucket/a@b/x", URL])
def test_a_url_that_stays_is_taken(url: str) -> None:
    assert checked(url) == url
    assert is_far(url)
    assert not is_far("data/a:b")
    assert not is_far(Path("data"))


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gs")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch, protocol: str, extra: str
) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(
        ValueError, match=rf"package for {protocol}:// .*pip install -e '\.\[{extra}\]'"
    ):
        far_files(f"{protocol}://bucket/x")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="zzz://x: Protocol not known"):
        far_files("zzz://x")


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"ETag": '"abc"', "LastModified": "today"}, "etag:abc"),
        ({"blob_id": "b", "lfs": {"sha256": "s"}}, "checksum:s"),
        ({"mtime": 5, "ETag": None}, "mtime:5"),
        ({"size": 5}, ""),
    ],
)
def test_a_checksum_is_taken_before_a_time(info: dict[str, Any], told: str) -> None:
    assert _checksum(info) == told


def test_what_changed_behind_the_url_is_refused_and_named(bucket, tmp_path: Path) -> None:
    bucket.pipe("/bucket/corpus/x.jsonl", lines(STORIES))
    write_record(tmp_path, URL)
    told = check_record(tmp_path, URL)
    assert told["path"] == URL
    assert told["num_bytes"] == len(lines(STORIES))
    assert told["digest"] == store.digest(tmp_path / told["record"])
    bucket.pipe("/bucket/corpus/x.jsonl", lines(STORIES[:3]))
    with pytest.raises(ValueError, match=r"x\.jsonl is .* the corpus changed; run `python -m"):
        check_record(tmp_path, URL)
    write_record(tmp_path, URL)
    assert check_record(tmp_path, URL)["digest"] != told["digest"]
    bucket.pipe("/bucket/corpus/y.jsonl", lines(STORIES))
    with pytest.raises(ValueError, match=r"y\.jsonl is .* has null"):
        check_record(tmp_path, URL)


def test_records_of_different_urls_lie_apart() -> None:
    one, other = record_of("s3://a/b-c"), record_of("s3://a/b/c")
    assert one.parent == other.parent == Path("data/far")
    assert one != other


def test_a_run_on_a_far_corpus_gives_the_tokens_of_a_near_one(bucket, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    published = []
    for root, path in ((near, "corpus.jsonl"), (far, f"{URL}/corpus.jsonl")):
        root.mkdir()
        if root == near:
            write_lines(root / path, STORIES)
        else:
            bucket.pipe("/bucket/corpus/corpus.jsonl", lines(STORIES))
            write_record(root, path)
        sections = {"corpus": SECTIONS["corpus"] | {"path": path}}
        run_stage(root, "train", train, **sections)
        published.append(run_stage(root, "tokenize", tokenize, **sections))
    for name in ("tokens.safetensors", "sequences.parquet", "documents.parquet"):
        assert (published[0] / name).read_bytes() == (published[1] / name).read_bytes()
    told = store.read_json(published[1] / "summary.json")["corpus"]
    assert told == check_record(far, f"{URL}/corpus.jsonl")


def test_dvc_watches_the_description_of_a_far_corpus(bucket, tmp_path: Path) -> None:
    sections = SECTIONS | {"corpus": SECTIONS["corpus"] | {"path": URL}}
    params = RunParams.model_validate(sections)
    entry = active.fit_entry(params)
    assert entry.corpus == record_of(URL).as_posix()
    write_lines(tmp_path / "queries.jsonl", [])
    with pytest.raises(ValueError, match=r"not described in data/far/.*; run `python -m flows act"):
        active.check_inputs(tmp_path, "mine", params)
    bucket.pipe("/bucket/corpus/x.jsonl", lines(STORIES))
    write_record(tmp_path, URL)
    active.check_inputs(tmp_path, "mine", params)
