"""Whatever the input is, it is taken, or a sentence names the place, the fault and a remedy."""

import copy
import datetime
import gzip
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from influence.layers import Layer
from tasks import tokenize, train
from tasks.active import Active
from tasks.corpora import Corpus, read_all
from tasks.expected import expected_targets
from tasks.kronfluence import read_kronfluence
from tasks.models import load_tokenizer
from tasks.params import ACTIVE, RunParams, checked, params_file, validated
from tasks.querysets import load_queries
from tasks.train import inspect_checkpoint
from tests.influence import models
from tests.small_run import MODEL, ROOT, run_stage, write_lines
from tests.test_kronfluence import KINDS, change, fit, write

QUICK = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
SLOW = settings(QUICK, max_examples=15)


def told(attempt: Callable[[], object], *places: str) -> None:
    """That it succeeds, or fails with a sentence that names the places and says what to do."""
    try:
        attempt()
    except ValueError as error:
        for line in str(error).split("\n") if places[0].startswith("params/") else [str(error)]:
            assert all(place in line for place in places), line
            assert re.search(r"; .{8}|\bwanted\b|did you mean", line), line


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
# Where in a file, and what stands there then; nothing: the file ends there.
damage = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=3)), min_size=1, max_size=3)
Damage = list[tuple[int, bytes]]


def damaged(content: bytes, at: Damage) -> bytes:
    for place, put in at:
        place %= len(content) or 1
        content = content[:place] + (put + content[place + len(put) :] if put else b"")
    return content


# --- corpora -------------------------------------------------------------------------------------

TEXT, PAIR, CHAT = {"text": "text"}, {"prompt": "q", "completion": "a"}, {"messages": "m"}
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Lily."}]
STORIES = [
    {"id": f"s{n}", "text": f"Story {n}.", "q": f"Who {n}?", "a": " Lily.", "m": TALK}
    for n in range(9)
]
LINES = "".join(json.dumps(story) + "\n" for story in STORIES).encode()
ways = st.sampled_from([TEXT, PAIR, CHAT])
likely = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("text", "q", "a", "m", "id", "role", "content"), json_values)
)


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def arrow(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


STORED = {
    "x.jsonl": LINES,
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "x.jsonl.zst": bytes(pa.compress(LINES, "zstd", asbytes=True)),
    "x.txt": "Eine Geschichte: é.\n--\nUnd noch eine.".encode(),
    "x.txt.gz": gzip.compress(b"One.\n--\nTwo.", mtime=0),
    "x.parquet": parquet(pa.Table.from_pylist(STORIES)),
    "x.arrow": arrow(pa.Table.from_pylist(STORIES)),
}
STATE = json.dumps({"_data_files": [{"filename": "x.arrow"}]}).encode()


@QUICK
@given(ways, st.lists(likely.map(json.dumps).map(str.encode) | st.binary(max_size=20), max_size=3))
@example(TEXT, [b'{"id": 1' + b"0" * 5000 + b', "text": "x"}'])
@example(TEXT, [b"[" * 100_000])
@example(TEXT, [b'{"id": "a", "text": "\\ud83d"}'])
def test_whatever_lines_hold(keys: dict[str, str], lines: list[bytes]) -> None:
    with folder() as here:
        (here / "x.jsonl").write_bytes(b"\n".join(lines))
        told(lambda: read_all(Corpus(here / "x.jsonl", keys, "id")), "x.jsonl")


@pytest.mark.parametrize("name", STORED)
@QUICK
@given(damage, ways)
def test_however_a_file_is_damaged(name: str, at: Damage, keys: dict[str, str]) -> None:
    with folder() as here:
        file = here / name
        file.write_bytes(damaged(STORED[name], at))
        if file.suffix == ".arrow":
            (here / "state.json").write_bytes(STATE)
        path, separator = (
            here if file.suffix == ".arrow" else file,
            "--" if ".txt" in name else None,
        )
        by = None if ".txt" in name else "id"
        told(lambda: read_all(Corpus(path, TEXT if separator else keys, by, None, separator)), name)


@QUICK
@given(damage | json_values.map(json.dumps).map(str.encode))
@example(b'{"_data_files": []}')
@example(b'{"_data_files": [{"filename": "y.arrow"}]}')
def test_however_the_state_of_a_saved_dataset_is_damaged(state: Damage | bytes) -> None:
    with folder() as here:
        (here / "x.arrow").write_bytes(STORED["x.arrow"])
        (here / "state.json").write_bytes(
            state if isinstance(state, bytes) else damaged(STATE, state)
        )
        told(lambda: read_all(Corpus(here, TEXT, "id")), "state.json")


def column(kind: pa.DataType, *values: Any) -> pa.Array:
    return pa.array([*values], kind)


COLUMNS = [
    column(pa.string(), "x"),
    column(pa.large_string(), "y"),
    column(pa.string(), None),
    column(pa.null(), None),
    column(pa.int64(), -1),
    column(pa.float64(), float("inf")),
    column(pa.bool_(), True),
    column(pa.binary(), b"\xff"),
    column(pa.date32(), datetime.date(2020, 1, 2)),
    column(pa.timestamp("s"), 1 << 60),  # no year that Python knows
    column(pa.timestamp("us", "Mars/Olympus"), 0),
    column(pa.duration("s"), 1 << 60),
    column(pa.time64("ns"), 1),
    column(pa.decimal128(5, 2), Decimal("1.25")),
    column(pa.list_(pa.int8()), [1, None]),
    column(pa.map_(pa.string(), pa.int8()), [("a", 1), ("a", 2)]),
    column(pa.struct([("a", pa.int8()), ("a", pa.int8())]), None),
    column(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), TALK),
    column(pa.list_(pa.struct([("role", pa.string()), ("content", pa.int8())])), None),
    pa.array(["x"]).dictionary_encode(),
]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@QUICK
@given(st.dictionaries(st.sampled_from(["text", "q", "a", "m", "id", "n"]),
                       st.sampled_from(COLUMNS)), ways)  # fmt: skip
def test_whatever_a_table_holds(
    name: str, columns: dict[str, pa.Array], keys: dict[str, str]
) -> None:
    table = pa.table(columns)
    with folder() as here:
        try:
            content = parquet(table) if name == "x.parquet" else arrow(table)
        except (pa.ArrowException, ValueError):
            return  # no such table can be
        (here / name).write_bytes(content)
        if name == "x.arrow":
            (here / "state.json").write_bytes(STATE)
        path = here / name if name == "x.parquet" else here
        named = name if table.num_rows else path.name  # of a corpus without documents, its path
        told(lambda: read_all(Corpus(path, keys, "id")), named)


# --- queries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    write_lines(root / "corpus.jsonl", [{"id": "a", "text": "Once.", "n": 1}])
    run_stage(root, "train", train)
    return run_stage(root, "tokenize", tokenize)


texts = st.sampled_from(["", "Once upon", " a time", "<s>", "e\u0301", "\ud83d", "🙂", "x" * 900])
ask, say = TALK
fields = {
    "name": st.sampled_from(["a", "b", "", 1, None]) | json_values,
    "prompt": texts | json_values,
    "completion": texts | json_values,
    "contrast": texts | json_values,
    "messages": st.lists(st.sampled_from([ask, say, ask | {"tool": 3}, {"role": "user"}]))
    | json_values,
    "generate": st.sampled_from([1, 0, 2000, True, 1.0]) | json_values,
    "tags": st.lists(st.sampled_from(["x", "y", " ", 3])) | json_values,
    "expected": st.lists(st.sampled_from(["a", "a@1", "none", "", {}, {"n": 1}])) | json_values,
    "note": json_values,
}
queries = st.fixed_dictionaries(
    {key: fields[key] for key in ("name", "prompt")},
    optional={key: value for key, value in fields.items() if key not in ("name", "prompt")},
) | st.fixed_dictionaries(
    {key: fields[key] for key in ("name", "messages")},
    optional={key: value for key, value in fields.items() if key not in ("name", "messages")},
)


@settings(QUICK, max_examples=100)
@given(st.lists(queries.map(json.dumps).map(str.encode) | st.binary(max_size=9), max_size=2),
       st.booleans())  # fmt: skip
@example([b'{"name": "a", "messages": [{"role": "assistant", "content": "Lily."}]}'], False)
def test_whatever_a_query_set_holds(tokenizer, tokens, lines: list[bytes], bos: bool) -> None:
    with folder() as here:
        file = here / "q.jsonl"
        file.write_bytes(b"\n".join(lines))

        def ask() -> None:
            found = load_queries(file, tokenizer, bos, 512, lambda *_: " there")
            expected_targets(found, tokens, file.name)

        told(ask, "q.jsonl")


# --- params --------------------------------------------------------------------------------------

TINY = YAML(typ="safe").load(ROOT / params_file("tinystories"))
SMOKE = YAML(typ="safe").load(ROOT / params_file("smoke"))
yaml_keys = st.sampled_from(["path", "ratio", "method", "x", "", 1, None, True, 0.5])
yaml_values = st.recursive(
    st.sampled_from([0, -1, 1, 0.5, 1e400, float("nan"), 10**30, "", "auto", "cuda", "ray", "mlp"])
    | st.sampled_from([datetime.date(2020, 1, 2), b"x", "s3://u@b/x", "hf://a", "file://x", "\0"])
    | st.none() | st.booleans() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(yaml_keys, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def paths(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in nested dicts."""
    found = []
    for key, value in content.items() if isinstance(content, dict) else ():
        found += [(*prefix, key), *paths(value, (*prefix, key))]
    return found


@settings(QUICK, max_examples=100)
@given(st.sampled_from([TINY, SMOKE]), st.data())
def test_whatever_a_params_file_says(content: dict[str, Any], data: st.DataObject) -> None:
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(paths(content)))
        inside = content
        for key in outer:
            inside = inside[key]
        how = data.draw(st.sampled_from(["put", "put", "put", "drop", "add"]))
        if how != "add":
            del inside[last]
        if how != "drop":
            inside[last if how == "put" else data.draw(yaml_keys)] = data.draw(yaml_values)
    told(lambda: validated(content, Path("params/x.yaml"), RunParams), "params/x.yaml: ")
    everything = data.draw(yaml_values)
    told(lambda: validated(everything, Path("params/x.yaml"), RunParams), "params/x.yaml: ")


ODD_YAML = [
    "&a [*a]", "*a", "? [a]\n: 1", "!!x 1", "2020-99-99: 1", "a: 1\n---\n", "{" * 300, "\0", "- x",
    "%YAML 9.9\n---\na: 1", "<<: 3", "a: !!int x", "1: 2", "\t", "a: !!binary é", "a: 2020-13-01",
]  # fmt: skip


def read_damaged(content: bytes) -> None:
    with folder() as here:
        (here / "params").mkdir()
        (here / ACTIVE).write_bytes(content)
        told(lambda: checked(here, ACTIVE, Active), str(ACTIVE))


@pytest.mark.parametrize("text", ODD_YAML)
def test_whatever_a_yaml_file_is(text: str) -> None:
    read_damaged(text.encode())


@SLOW
@given(damage)
def test_however_a_yaml_file_is_damaged(at: Damage) -> None:
    read_damaged(damaged((ROOT / ACTIVE).read_bytes(), at))


# --- checkpoints ---------------------------------------------------------------------------------

CONFIG = json.loads((MODEL / "config.json").read_text())
values = st.sampled_from([None, -1, 0, 1, 3, 64, 0.5, True, "", "x", "gpt2", [], {}, [1], {"a": 1}])


@contextmanager
def spoilt(name: str, content: bytes | None) -> Iterator[Path]:
    """A checkpoint of which one file holds something else, or lacks."""
    with folder() as here:
        for file in MODEL.iterdir():
            (here / file.name).symlink_to(file)
        (here / name).unlink(missing_ok=True)
        if content is not None:
            (here / name).write_bytes(content)
        yield here


def inspected(name: str, content: bytes | None) -> None:
    def inspect(here: Path) -> None:
        found = inspect_checkpoint(here, "checkpoint", "x")
        assert found.context is None or type(found.context) is int

    with spoilt(name, content) as here:
        told(lambda: inspect(here), str(here))


@SLOW
@given(
    st.sampled_from([*CONFIG, "quantization_config", "auto_map", "rope_scaling", "dtype"]), values
)
def test_whatever_a_config_says(key: str, value: Any) -> None:
    inspected("config.json", json.dumps(CONFIG | {key: value}).encode())


@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "generation_config.json", "special_tokens_map.json", "chat_template.jinja",
])  # fmt: skip
@settings(SLOW, max_examples=8)
@given(damage | json_values.map(json.dumps).map(str.encode) | st.none())
def test_however_a_file_of_a_checkpoint_is_damaged(name: str, how: Damage | bytes | None) -> None:
    file = MODEL / name
    content = file.read_bytes() if file.is_file() else b'{"x": "y"}'
    inspected(name, damaged(content, how) if isinstance(how, list) else how)


# --- fits of kronfluence -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kronfluence(tmp_path_factory) -> tuple[Path, tuple[Layer, ...]]:
    fitted = fit(models.mlp())
    return write(tmp_path_factory.mktemp("kronfluence") / "factors_f", fitted), fitted.layers


@settings(SLOW, max_examples=40)
@given(st.sampled_from(["factor_arguments.json", "activation_eigenvectors.safetensors",
    "lambda_matrix.safetensors", "num_lambda_processed.safetensors"]),
    damage | json_values.map(json.dumps).map(str.encode))  # fmt: skip
def test_however_a_fit_of_kronfluence_is_damaged(
    kronfluence, name: str, how: Damage | bytes
) -> None:
    written, layers = kronfluence
    with folder() as here:
        for file in written.iterdir():
            (here / file.name).symlink_to(file)
        (here / name).unlink()
        (here / name).write_bytes(
            how if isinstance(how, bytes) else damaged((written / name).read_bytes(), how)
        )
        told(lambda: read_kronfluence(here, layers), str(here))


@settings(SLOW, max_examples=40)
@given(st.sampled_from(KINDS), st.sampled_from([torch.ones(()), torch.ones(0), torch.ones(2),
    torch.ones(6, 4), torch.ones(6, 4).bool(), torch.ones(4, 4, dtype=torch.int64),
    torch.ones(6, 6, dtype=torch.complex64), torch.tensor([-3]), torch.tensor([torch.inf]),
    torch.tensor([2.5]), torch.ones(6, 4, dtype=torch.float8_e4m3fn)]))  # fmt: skip
def test_whatever_a_tensor_of_kronfluence_is(kronfluence, kind: str, tensor: torch.Tensor) -> None:
    written, layers = kronfluence
    with folder() as here:
        for file in written.iterdir():
            (here / file.name).write_bytes(file.read_bytes())
        change(here, kind, "head", tensor)
        told(lambda: read_kronfluence(here, layers), str(here))
