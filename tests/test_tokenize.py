"""From documents to sequences: nothing lost, names and keys stable, shards without effect."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import reading, store, tokenize, train, windows
from tasks.corpora import Document
from tasks.models import load_tokenizer
from tasks.sequences import TokenStore, choose_rows
from tasks.windows import Encoded, cut_windows, encode, sequence_key, sequence_keys
from tests.small_run import MODEL, SECTIONS, run_stage, stage_context, write_lines

STORIES = [
    {"id": "long", "text": "Once upon a time there was a cat. " * 12, "author": "Ann"},
    {"id": "short", "text": "The end."},
    {"id": "empty", "text": ""},
    {"id": "smile", "text": "I am happy 🙂, said Tom.", "tags": ["a", "b"]},
    {"id": "last", "text": "Lily and Ben played in the park. " * 5},
]


@pytest.fixture
def run_root(tmp_path) -> Path:
    """A project with a corpus and the stage `train` done."""
    write_lines(tmp_path / "corpus.jsonl", STORIES)
    run_stage(tmp_path, "train", train)
    return tmp_path


def tokenized(root: Path, shards: int = 3, corpus: dict | None = None, **settings) -> Path:
    section = {"mode": "document", "context": 64, "bos": True, "eos": False} | settings
    runtime = stage_context(root, "tokenize").params.runtime.model_dump() | {"shards": shards}
    corpus = corpus or SECTIONS["corpus"]
    return run_stage(root, "tokenize", tokenize, corpus=corpus, tokenize=section, runtime=runtime)


def sequences(folder: Path) -> list[dict]:
    return store.read_table(folder / "sequences.parquet").to_pylist()


def plain(tokens: list[np.ndarray]) -> list[Encoded]:
    """Of text without a prompt."""
    return [Encoded(row, np.ones(len(row), np.bool_)) for row in tokens]


# --- cutting -------------------------------------------------------------------------------------

ragged = st.lists(st.integers(0, 9), min_size=0, max_size=8)


@given(lengths=ragged, context=st.integers(2, 5), mode=st.sampled_from(["document", "pack"]))
def test_windows_lose_and_repeat_no_token(lengths, context, mode):
    tokens, total = [], 0
    for length in lengths:
        tokens.append(np.arange(total, total + length, dtype=np.int32))
        total += length
    names = [f"d{place}" for place in range(len(lengths))]
    windows = cut_windows(names, plain(tokens), mode, context)
    assert windows.tokens.tolist() == list(range(total))
    sizes = np.diff(windows.offsets)
    assert windows.offsets[0] == 0
    assert windows.offsets[-1] == total
    assert ((sizes >= 1) & (sizes <= context)).all()
    assert len(windows.names) == len(windows.documents) == len(sizes)
    assert len(set(windows.names)) == len(windows.names)
    assert windows.supervised.sum() == total - len(sizes)


def test_long_documents_do_not_meet_in_the_tokenizer(monkeypatch):
    tokenizer = load_tokenizer(MODEL)
    documents = [
        Document(f"d{place}", "Once upon a time. " * times, {}, "corpus.jsonl:1")
        for place, times in enumerate((1, 2, 3, 40, 1, 0, 2))
    ]
    wanted = encode(tokenizer, documents, bos=True, eos=False)
    calls: list[list[int]] = []

    class Counting(type(tokenizer)):
        def __call__(self, texts, **settings):
            calls.append([len(text) for text in texts])
            return super().__call__(texts, **settings)

    monkeypatch.setattr(windows, "CHARACTERS_AT_ONCE", 100)
    tokenizer.__class__ = Counting
    found = encode(tokenizer, documents, bos=True, eos=False)
    assert [each.tokens.tolist() for each in found] == [each.tokens.tolist() for each in wanted]
    assert calls == [[18, 36], [54], [720], [18, 0, 36]]


def test_document_mode_never_mixes_documents_and_names_the_offset():
    tokens = [np.arange(5, dtype=np.int32), np.array([], np.int32), np.arange(2, dtype=np.int32)]
    windows = cut_windows(["a", "b", "c"], plain(tokens), "document", 2)
    assert windows.names == ["a", "a@2", "a@4", "c"]
    assert windows.documents == [["a"], ["a"], ["a"], ["c"]]
    assert windows.offsets.tolist() == [0, 2, 4, 5, 7]
    assert windows.supervised.tolist() == [False, True, False, True, False, False, True]


def test_pack_mode_fills_windows_across_documents_and_keeps_the_tail():
    tokens = [np.arange(3, dtype=np.int32), np.array([], np.int32), np.arange(4, dtype=np.int32)]
    windows = cut_windows(["a", "b", "c"], plain(tokens), "pack", 3)
    assert windows.names == ["a", "c", "c@3"]
    assert windows.documents == [["a"], ["c"], ["c"]]
    windows = cut_windows(["a", "b", "c"], plain(tokens), "pack", 4)
    assert windows.names == ["a", "c@1"]
    assert windows.documents == [["a", "c"], ["c"]]


def test_key_is_the_start_of_blake2b_and_never_negative():
    # blake2b("a") begins 333fcb4ee1aa7c11, blake2b("") 786a02f742015903.
    assert sequence_key("a") == 0x333FCB4EE1AA7C11
    assert sequence_key("") == 0x786A02F742015903
    assert all(0 <= sequence_key(str(n)) < 2**63 for n in range(1000))


def test_two_sequences_with_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"sequences 'a@2' and 'a@2' have the same key"):
        sequence_keys(["a", "a@2", "a@2"])


# --- the stage -----------------------------------------------------------------------------------


def test_tokens_decode_to_the_documents_and_metadata_is_kept(run_root):
    folder = tokenized(run_root)
    tokenizer = load_tokenizer(MODEL)
    found, tokens = sequences(folder), TokenStore.open(folder)
    of_long = [row for row, s in enumerate(found) if s["documents"] == ["long"]]
    assert [found[row]["sequence"] for row in of_long] == ["long", "long@64"]
    joined = [token for row in of_long for token in tokens.row_tokens(row).tolist()]
    # One BOS begins the document; further windows go on without another.
    assert joined.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(joined[1:]) == STORIES[0]["text"]
    documents = store.read_table(folder / "documents.parquet").to_pylist()
    assert [d["document"] for d in documents] == [s["id"] for s in STORIES]
    assert json.loads(documents[3]["metadata"]) == {"tags": ["a", "b"]}


def test_table_counts_and_keys_describe_the_tokens(run_root):
    folder = tokenized(run_root)
    found, tokens = sequences(folder), TokenStore.open(folder)
    assert tokens.num_sequences == len(found)
    assert [s["num_tokens"] for s in found] == list(tokens.lengths)
    assert [s["num_supervised"] for s in found] == [n - 1 for n in tokens.lengths]
    assert [s["key"] for s in found] == tokens.keys.tolist()
    assert [s["key"] for s in found] == [sequence_key(s["sequence"]) for s in found]
    summary = store.read_json(folder / "summary.json")
    assert summary["num_documents"] == 5
    assert summary["num_sequences"] == len(found)
    assert summary["num_tokens"] == sum(tokens.lengths)
    assert summary["num_supervised"] == summary["num_tokens"] - len(found)
    assert summary["corpus"]["digest"] == store.digest(run_root / "corpus.jsonl")


@pytest.mark.parametrize("mode", ["document", "pack"])
def test_number_of_shards_changes_no_byte(run_root, mode):
    contents = []
    for shards in (1, 3, 5):
        folder = tokenized(run_root, shards, mode=mode, context=16)
        contents.append({file.name: store.digest(file) for file in folder.iterdir()})
    assert len(contents[0]) == 4
    assert contents[0] == contents[1] == contents[2]


def test_pack_mode_puts_bos_and_eos_around_every_document(run_root):
    folder = tokenized(run_root, mode="pack", context=32, eos=True)
    tokens = TokenStore.open(folder)
    stream = tokens.tokens.tolist()
    assert stream.count(1) == stream.count(2) == len(STORIES)
    assert set(tokens.lengths[:-1]) == {32}
    assert 1 <= tokens.lengths[-1] <= 32


def test_batch_is_padded_on_the_right_and_supervises_all_but_the_first(run_root):
    tokens = TokenStore.open(tokenized(run_root))
    batch = tokens.batch([3, 0])
    assert batch.ids.tolist() == [int(tokens.keys[3]), int(tokens.keys[0])]
    assert batch.tokens.shape == (2, 64)
    assert batch.tokens[0, : tokens.lengths[3]].tolist() == tokens.row_tokens(3).tolist()
    assert batch.supervised.sum(dim=1).tolist() == [tokens.lengths[3] - 1, 63]
    assert not batch.supervised[:, 0].any()


# --- choices of rows -----------------------------------------------------------------------------


def test_choice_depends_on_nothing_but_its_arguments_and_grows():
    ten = choose_rows(range(1000), 10, seed=0)
    assert ten == choose_rows(range(1000), 10, seed=0) == sorted(ten)
    assert len(set(ten)) == 10
    assert ten != choose_rows(range(1000), 10, seed=1)
    assert set(ten) < set(choose_rows(range(1000), 20, seed=0))
    # Pinned: a change of library or platform that moves this moves everybody's fit.
    assert ten == [358, 412, 527, 584, 646, 667, 731, 760, 936, 998]
    assert choose_rows([5, 3], 7, seed=0) == [3, 5]


def test_choice_from_a_set_does_not_favour_what_was_chosen_into_it_before():
    # 200 of 10 000 audited, then 100 of the 400 candidates as a control, all with one seed. With
    # hashes that ignore the set, the control would be nearly all audit.
    shares = []
    for seed in range(20):
        audit = choose_rows(range(10_000), 200, seed)
        candidates = [*range(10_000, 10_200), *audit]
        control = choose_rows(candidates, 100, seed)
        shares.append(sum(row in audit for row in control) / 100)
    assert abs(sum(shares) / 20 - 0.5) < 0.05  # 4.5 standard errors


@pytest.mark.parametrize("shards", [1, 3, 4, 100])
def test_shards_of_rows_are_contiguous_balanced_and_never_empty(run_root, shards):
    tokens = TokenStore.open(tokenized(run_root, context=16))
    rows = list(range(1, tokens.num_sequences))
    parts = tokens.shard_rows(rows, shards)
    assert [row for part in parts for row in part] == rows
    assert 1 <= len(parts) <= shards
    assert all(parts)
    sizes = [sum(tokens.lengths[row] for row in part) for part in parts]
    assert max(sizes) <= sum(sizes) / shards + 16
    assert tokens.shard_rows([], shards) == []


# --- what is predicted ---------------------------------------------------------------------------

FILE = {"path": "corpus.jsonl", "id": None, "limit": None}
PAIRS = FILE | {"prompt": "question", "completion": "answer"}
CHATS = FILE | {"messages": "talk"}
# As ChatML: what the assistant says ends with a mark of its own.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "user", "content": "Who is Lily?"},
    {"role": "assistant", "content": "A little girl."},
    {"role": "user", "content": "And Tom?"},
    {"role": "assistant", "content": "Her big dog."},
]


def predicted(folder: Path, row: int = 0) -> str:
    """What a sequence's targets say."""
    tokens = TokenStore.open(folder)
    chosen = tokens.row_tokens(row)[tokens.supervised[tokens._slice(row)].bool()]
    return load_tokenizer(MODEL).decode(chosen.tolist())


@pytest.mark.parametrize("mode", ["document", "pack"])
def test_of_a_pair_the_completion_alone_is_predicted(run_root, mode):
    pairs = [
        {"question": "Lily saw a cat. What did she", "answer": " see? A cat.", "from": "me"},
        {"question": "", "answer": "Once upon a time"},
    ]
    write_lines(run_root / "corpus.jsonl", pairs)
    folder = tokenized(run_root, corpus=PAIRS, mode=mode)
    tokenizer, tokens = load_tokenizer(MODEL), TokenStore.open(folder)
    whole = [pair["question"] + pair["answer"] for pair in pairs]
    if mode == "document":
        assert [predicted(folder, row) for row in (0, 1)] == ["see? A cat.", "Once upon a time"]
        assert [tokenizer.decode(tokens.row_tokens(row)[1:].tolist()) for row in (0, 1)] == whole
    else:
        assert predicted(folder).replace("<s>", " ").split() == (
            ["see?", "A", "cat.", "Once", "upon", "a", "time"]
        )
    [first, _] = store.read_table(folder / "documents.parquet").to_pylist()
    assert json.loads(first["metadata"]) == {"from": "me"}


def test_eos_after_a_completion_is_predicted_and_bos_before_a_prompt_is_not(run_root):
    write_lines(run_root / "corpus.jsonl", [{"question": "Who?", "answer": " Lily."}] * 2)
    folder = tokenized(run_root, corpus=PAIRS, mode="pack", eos=True)
    assert predicted(folder) == "Lily.</s> Lily.</s>"


@pytest.fixture
def chatty(monkeypatch):
    """Makes the model's tokenizer one with a chat template."""

    def of(template: str | None) -> None:
        def loaded(folder):
            tokenizer = load_tokenizer(folder)
            tokenizer.chat_template = template
            return tokenizer

        monkeypatch.setattr(tokenize, "load_tokenizer", loaded)

    return of


def test_of_a_conversation_what_the_assistant_says_is_predicted(run_root, chatty):
    chatty(TEMPLATE)
    write_lines(run_root / "corpus.jsonl", [{"talk": TALK}, {"talk": TALK[:2]}])
    folder = tokenized(run_root, corpus=CHATS, context=512)
    assert predicted(folder).replace(" ", "") == "Alittlegirl.[end]Herbigdog.[end]"
    assert predicted(folder, 1).replace(" ", "") == "Alittlegirl.[end]"
    text = load_tokenizer(MODEL).decode(TokenStore.open(folder).row_tokens(1)[1:].tolist())
    assert text == "[user] Who is Lily? [end]\n[assistant] A little girl. [end]\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"corpus\.jsonl:1: messages want a chat template"),
        # As of a model whose earlier thoughts are left out.
        (
            "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
            "{% endif %}{% endfor %}",
            r"corpus\.jsonl:1: .* writes message 2 of document 'corpus\.jsonl:1' otherwise",
        ),
        ("{{ raise_exception('no system role') }}", r"corpus\.jsonl:1: .*refuses.*no system role"),
    ],
    ids=["none", "forgetful", "strict"],
)
def test_a_template_that_does_not_do_is_named(run_root, chatty, template, message):
    chatty(template)
    write_lines(run_root / "corpus.jsonl", [{"talk": TALK}])
    with pytest.raises(ValueError, match=message):
        tokenized(run_root, corpus=CHATS)


def test_text_that_ends_with_eos_is_an_error(run_root):
    write_lines(run_root / "corpus.jsonl", [{"id": "x", "text": "The end.</s>"}])
    with pytest.raises(ValueError, match=r"'x' ends with the EOS token '</s>'.* double it"):
        tokenized(run_root, eos=True)


# --- what stops the stage ------------------------------------------------------------------------


def test_context_beyond_the_model_stops_before_the_corpus_is_read(run_root):
    (run_root / "corpus.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tokenize\.context is 513, .* reads at most 512 tokens"):
        tokenized(run_root, context=513)


def test_text_that_begins_with_bos_is_an_error(run_root):
    write_lines(run_root / "corpus.jsonl", [*STORIES, {"id": "x", "text": "<s>Once"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl:6: document 'x' begins with the BOS"):
        tokenized(run_root)
    assert tokenized(run_root, bos=False).is_dir()


def test_bad_line_stops_the_stage_before_any_shard(run_root):
    with (run_root / "corpus.jsonl").open("a") as stream:
        stream.write('{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl:6: no field 'text'"):
        tokenized(run_root)
    assert not list((run_root / ".work").glob("*tokenize*/shard*"))


def test_corpus_without_anything_to_predict_is_an_error(run_root):
    write_lines(run_root / "corpus.jsonl", [{"id": "a", "text": ""}, {"id": "b", "text": ""}])
    for bos in (True, False):
        with pytest.raises(ValueError, match=r"no sequence of its 2 documents has two tokens"):
            tokenized(run_root, bos=bos)


def test_document_named_like_a_window_of_another_is_an_error(run_root):
    write_lines(run_root / "corpus.jsonl", [*STORIES, {"id": "long@64", "text": "Hello."}])
    with pytest.raises(ValueError, match=r"'long@64' and 'long@64' have the same key"):
        tokenized(run_root)


def test_tokenizer_without_eos_is_an_error_that_names_the_setting(run_root, monkeypatch):
    def without_eos(folder):
        tokenizer = load_tokenizer(folder)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(tokenize, "load_tokenizer", without_eos)
    with pytest.raises(ValueError, match=r"no EOS token; set tokenize\.eos to false"):
        tokenized(run_root, eos=True)


# --- memory --------------------------------------------------------------------------------------


def peak(root: Path, num_documents: int, **settings) -> int:
    """Bytes that Python and NumPy held at most while a corpus was tokenised."""
    root.mkdir()
    text = "Once upon a time there was a cat that sat on a mat. " * 40
    write_lines(
        root / "corpus.jsonl",
        [{"id": f"d{n}", "text": f"{n} {text}"} for n in range(num_documents)],
    )
    run_stage(root, "train", train)
    tracemalloc.start()
    tokenized(root, shards=1, context=512, **settings)  # two at once would peak by chance
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("mode", ["document", "pack"])
def test_memory_does_not_grow_with_the_corpus_but_for_its_index(tmp_path, monkeypatch, mode):
    """Ten times the documents, 2 kB of text and 4 kB of tokens each; the index: names and ids."""
    monkeypatch.setattr(tokenize, "DOCUMENTS_AT_ONCE", 8)
    monkeypatch.setattr(reading, "DOCUMENTS_AT_ONCE", 8)
    monkeypatch.setattr(store, "CHUNK", 1 << 12)  # of a megabyte, a small file would fill a part
    few, index = 16, 500
    peak(tmp_path / "first", 1, mode=mode)  # what is imported and cached once
    one, ten = (peak(tmp_path / str(n), n, mode=mode) for n in (few, 10 * few))
    assert ten < 1.05 * one + 9 * few * index
