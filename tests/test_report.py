"""The report page: nothing fetched, nothing unescaped, every number where it belongs."""

import base64
import json
import math
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import report, store
from tasks.page.characters import visible
from tasks.page.document import document
from tasks.page.evidence import Evidence
from tasks.page.facts import facts
from tasks.page.health import verdicts
from tasks.page.numbers import Nats, change_in_probability, correlation, plain
from tasks.page.pictures import Rows, layer_strip, short, token_map
from tasks.page.shading import LEVELS, ShadedText, levels, shaded_text
from tasks.spans import Span
from tests.small_run import run_stage

LAYERS = [
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.up_proj",
]
HOSTILE = (
    "</p></article><script>alert(1)</script><img src=x onerror=alert(2)> \"'& &amp; "
    "\u202egnp.exe\u2066 \x00\x07\x1b[31m שלום مرحبا 👩‍👩‍👧 \ufffd \u2028 </style></script>"
)
VOID = {"meta", "link", "img", "br", "rect", "path"}
TOP_SCHEMA = {
    "query": "string",
    "sign": "string",
    "rank": "int64",
    "row": "int64",
    "key": "int64",
    "sequence": "string",
    "group": "int64",
    "documents": "list<string>",
    "metadata": "string",
    "influence": "float64",
    "influence_low_rank": "float64",
    "layers": "list<float>",
    "tokens": "list<string>",
    "token_influence": "list<float>",
    "layer_token_influence": "list<list<float>>",
    "sparsity": "float64",
}


class Page(HTMLParser):
    """Elements with their attributes and text; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "text": "", **{key: value or "" for key, value in attrs}}
        element["inside"] = [outer.get("class", outer["tag"]) for outer in self.open]
        self.elements.append(element)
        if tag not in VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append({"tag": tag, "text": "", "inside": [], **dict(attrs)})

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if any(element.get("class") == "dots" for element in self.open):
            return
        for element in self.open:
            element["text"] += data

    def all(self, tag: str = "", css: str = "") -> list[dict[str, Any]]:
        return [
            element
            for element in self.elements
            if (not tag or element["tag"] == tag)
            and (not css or css in element.get("class", "").split())
        ]


def row(
    query: str = "lily", sign: str = "+", rank: int = 1, text: str = "", **more: Any
) -> dict[str, Any]:
    """A row of top.parquet about `text`, its tokens pieces of four characters."""
    text = text or "Once upon a time there was a little girl named Lily. She had a cat."
    tokens = [text[at : at + 4] for at in range(0, len(text), 4)]
    flip = 1 if sign == "+" else -1
    influence = [flip * math.sin(at + 1) * 1e-4 + flip * 1e-5 for at in range(len(tokens) - 1)] + [
        0
    ]
    grid = [[share * value for value in influence] for share in (0.5, 0.3, 0.2)]
    return {
        "query": query,
        "sign": sign,
        "rank": rank,
        "row": 10 * rank + (sign == "-"),
        "key": 7_000 + rank,
        "sequence": f"ts-{rank}@0",
        "group": 10 * rank + (sign == "-"),
        "documents": [f"ts-{rank}"],
        "metadata": json.dumps({"split": "train"}),
        "influence": flip * 0.004 / rank,
        "influence_low_rank": flip * 0.0039 / rank,
        "layers": [flip * 0.002 / rank, flip * 0.0012 / rank, flip * 0.0008 / rank],
        "tokens": tokens,
        "token_influence": influence,
        "layer_token_influence": grid,
        "sparsity": 0.3,
    } | more


def evidence(*rows: dict[str, Any], **more: Any) -> Evidence:
    queries = [
        {
            "name": "lily",
            "prompt": "There was a little girl named",
            "completion": " Lily.",
            "prompt_tokens": [1, 2, 3],
            "completion_tokens": [4, 5],
            "log_probability": -1.5,
            "category": "names",
            "note": "The commonest name.",
        }
    ]
    summary = {
        "run": "small",
        "model": {"source": "data/models/tiny", "parameters": 260_032, "digest": "m" * 64},
        "corpus": {
            "path": "data/corpus",
            "num_documents": 9,
            "num_sequences": 12,
            "num_tokens": 99,
        },
        "num_training_sequences": 12,
        "sign": "positive raises log p",
        "unit": "nats per extra copy",
        "label_source": "sampled from the model",
        "layers": LAYERS,
        "coverage": {
            "share": 0.635,
            "num_attributed": 165_120,
            "left_out": [
                {"name": "lm_head", "num_parameters": 32_768, "reason": "tied to embed_tokens"},
                {"name": "norm", "num_parameters": 64, "reason": "not in `layers`"},
            ],
        },
        "damping": {
            "rule": {"ratio": 0.1},
            "layers": dict(zip(LAYERS, (3e-4, 2e-3, 5e-5), strict=True)),
        },
        "rank": 32,
        "rescore": {"pearson_control": 0.999},
        "digests": {"factors": "f" * 64},
    }
    given = {
        "run": "small",
        "title": "A small run",
        "summary": summary,
        "queries": queries,
        "top": rows or (row(), row(sign="-")),
        "metrics": {
            "split_half": {"pearson": 0.97, "low": 0.95, "high": 0.99, "num_queries": 1},
            "layers": {name: {"trace_ratio": 1.0, "condition": 1e5} for name in LAYERS},
        },
        "recall": {
            "method": "tfidf",
            "top": 200,
            "audit": 50,
            "recall": 0.6,
            "low": 0.5,
            "high": 0.7,
        },
        "baselines": [
            {"query": "lily", "row": 10, "tfidf_rank": 3, "bm25_rank": 5, "gradient_dot_rank": 2},
            {"query": "lily", "row": 11, "tfidf_rank": 4, "bm25_rank": 6, "gradient_dot_rank": 9},
        ],
    }
    return Evidence(**(given | more))


def expectation(name: str) -> dict[str, Any]:
    """An entry of expected.json with one target found and one that the filter kept out."""
    measures = {"recall_10": 0.5, "recall_100": 0.5, "mrr": 0.25}
    return {
        "num_expected": 2,
        "num_filtered": 1,
        "methods": {"ekfac": measures, "bm25": measures | {"mrr": 0.125}},
        "targets": [
            {"name": name, "num_sequences": 3, "ranks": {"ekfac": 4, "bm25": 8}},
            {"name": "lost", "num_sequences": 1, "ranks": {"ekfac": None, "bm25": None}},
        ],
    }


def pieces(text: ShadedText) -> list[tuple[str, int, bool]]:
    return [
        (piece.text, piece.level, group.marked)
        for part in (text.before, text.window, text.after)
        for group in part
        for piece in group.pieces
    ]


NATS = Nats.of(0.004)

# --- the stage ---------------------------------------------------------------------------------


def write_artefacts(root: Path, found: Evidence) -> None:
    folder = root / "artifacts/small"
    store.write_json(folder / "score/summary.json", found.summary)
    columns = {name: [one[name] for one in found.top] for name in TOP_SCHEMA}
    store.write_table(folder / "score/top.parquet", columns, TOP_SCHEMA)
    store.write_json(folder / "query/queries.json", list(found.queries))
    store.write_json(folder / "validate/metrics.json", found.metrics)
    store.write_json(folder / "validate/recall.json", found.recall)
    store.write_json(folder / "validate/expected.json", found.expected)
    kinds = {"query": "string", **dict.fromkeys(("row", "tfidf_rank", "bm25_rank"), "int64")}
    kinds["gradient_dot_rank"] = "int64"
    columns = {name: [one[name] for one in found.baselines] for name in kinds}
    store.write_table(folder / "validate/baselines.parquet", columns, kinds)
    (folder / "validate/figures").mkdir()
    (folder / "validate/figures/spectra.png").write_bytes(b"\x89PNG not really")


def test_the_stage_writes_one_page_that_says_what_the_artefacts_say(tmp_path: Path) -> None:
    write_artefacts(tmp_path, evidence())
    published = run_stage(tmp_path, "report", report)
    assert [file.name for file in published.iterdir()] == ["index.html"]
    html = (published / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    text = " ".join(page.elements[0]["text"].split())
    for fact in (
        "data/models/tiny", "260,032 parameters", "63.5 %", "165,120 in 3 layers", "N = 12",
        "0.1 × mean Λ", "0.00200", "5.00×10⁻⁵", "lm_head", "tied to embed_tokens",
        "not in `layers`", "sampled from the model", "60 % (50 % to 70 %)", "ts-1@0", "category",
        "names", "−1.500 nats", "−0.750 per token over 2 tokens", "+0.00400", "−0.00400", "train",
        "f" * 64, "m" * 64,
    ):  # fmt: skip
        assert fact in text, fact
    assert base64.b64encode(b"\x89PNG not really").decode() in html


def test_a_missing_artefact_is_named(tmp_path: Path) -> None:
    write_artefacts(tmp_path, evidence())
    (tmp_path / "artifacts/small/validate/recall.json").unlink()
    with pytest.raises(ValueError, match=r"validate/recall\.json does not exist"):
        run_stage(tmp_path, "report", report)


def test_the_same_artefacts_give_the_same_bytes() -> None:
    assert document(evidence(), 10) == document(evidence(), 10)


# --- safe and self-contained -------------------------------------------------------------------


def test_the_page_fetches_nothing() -> None:
    html = document(evidence(), 10)
    page = Page(html)
    for element in page.elements:
        for name in ("src", "srcset", "data", "poster", "action"):
            assert element.get(name, "data:").startswith("data:"), element
        if element["tag"] == "link":
            assert element["href"] == "data:,"
        if element["tag"] == "a":
            assert element["href"].startswith(("#", "https://arxiv.org/abs/"))
    [style] = page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    [policy] = [e for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy["content"]


def test_hostile_text_stays_text_wherever_it_comes_from() -> None:
    hostile = row(text=HOSTILE * 3, sequence=HOSTILE, documents=[HOSTILE])
    hostile["metadata"] = json.dumps({HOSTILE: HOSTILE, "nested": [HOSTILE]})
    found = evidence(hostile, title=HOSTILE, run=HOSTILE)
    query = dict(found.queries[0]) | {
        "prompt": HOSTILE, "completion": HOSTILE, "note": HOSTILE, HOSTILE: HOSTILE,
        "bad": "\ud800", "tags": [HOSTILE, "'"],
    }  # fmt: skip
    summary = json.loads(json.dumps(found.summary))
    summary["model"]["source"] = HOSTILE
    summary["coverage"]["left_out"][0] = {"name": HOSTILE, "num_parameters": 1, "reason": HOSTILE}
    expected = {"queries": {query["name"]: expectation(HOSTILE)}}
    html = document(replace(found, queries=[query], summary=summary, expected=expected), 10)
    html.encode("utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert len(page.all("style")) == 1
    assert not [
        element for element in page.elements if any(key.startswith("on") for key in element)
    ]
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", html
    )
    [text] = page.all("p", "text")
    assert text["text"] == visible("".join(hostile["tokens"]))
    assert "⟨U+202E⟩" in text["text"]
    assert "👩‍👩‍👧" in text["text"]


def test_the_text_of_a_sequence_is_its_tokens_joined() -> None:
    texts = ["  two  spaces\n\nand\tlines ", "x", " Lily. " * 300, "no space at all" * 60, ""]
    found = evidence(*(row(rank=at + 1, text=text or "?") for at, text in enumerate(texts)))
    shown = [element["text"] for element in Page(document(found, 10)).all("p", "text")]
    assert shown == [text or "?" for text in texts]


def test_control_characters_become_pictures_and_joiners_stay() -> None:
    assert visible("a\x00b\x1b\x7f\x85\r\n\tc") == "a␀b␛␡\ufffd\n\tc"
    assert visible("\u202ex\u2069 \ud800 \ufeff") == "⟨U+202E⟩x⟨U+2069⟩ \ufffd "
    assert visible("👩‍👧 שלום e\u0301") == "👩‍👧 שלום e\u0301"


# --- shading and marks -------------------------------------------------------------------------


def test_sign_and_strength_become_a_shade() -> None:
    text = shaded_text(["a", " b", " c", " d"], [0.004, -0.002, 0.0, 0.00001], [], 50, NATS)
    assert [(piece, shade) for piece, shade, _ in pieces(text)] == [
        ("a", 6), (" b", -4), (" c d", 0),
    ]  # fmt: skip


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_more_influence_is_never_a_weaker_shade(one: float, other: float) -> None:
    first, second, _ = levels([one, other, 1.0]).tolist()
    assert -LEVELS <= first <= LEVELS
    assert first * one >= 0
    if abs(one) <= abs(other):
        assert abs(first) <= abs(second)


def test_a_sequence_without_influence_is_not_shaded() -> None:
    assert pieces(shaded_text(["a", "b"], [0.0, 0.0], [], 50, NATS)) == [("ab", 0, False)]


def test_the_hint_gives_the_value_and_the_token_that_is_predicted() -> None:
    text = shaded_text(["named", " Lily", "\n"], [0.001, -0.004, 0.0], [], 50, NATS)
    [group] = text.window
    assert [piece.hint for piece in group.pieces] == ["+0.001000 → Lily", "−0.004000 → ↵", ""]


def test_neighbours_of_the_faintest_shade_are_one_piece_with_their_sum() -> None:
    influence = [0.0002, 0.0002, 0.0002, 0.004]
    text = shaded_text(["a", "b", "c", "d"], influence, [], 50, NATS)
    [group] = text.window
    assert [(piece.text, piece.level) for piece in group.pieces] == [("abc", 1), ("d", 6)]
    assert group.pieces[0].hint == "+0.000600 over 3 tokens"


def test_marks_cut_tokens_and_keep_their_shade() -> None:
    text = shaded_text([" a b", "c d", " e"], [0.004, -0.004, 0.0], [Span(3, 6)], 50, NATS)
    assert pieces(text) == [
        (" a ", 6, False), ("b", 6, True), ("c ", -6, True), ("d", -6, False), (" e", 0, False),
    ]  # fmt: skip


def test_words_shared_with_the_query_are_marked_inside_the_shaded_text() -> None:
    page = Page(document(evidence(row()), 10))
    [mark] = [one for one in page.all("mark") if any("text" in c.split() for c in one["inside"])]
    assert mark["text"] == "there was a little girl named Lily"
    assert any("mark" in shade["inside"] for shade in page.all("i"))


@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 80), st.integers(1, 30)), max_size=4),
    st.integers(1, 30),
    st.data(),
)
def test_no_cut_loses_or_repeats_a_character(tokens, marks, width, data) -> None:
    size = st.floats(-1, 1)
    influence = data.draw(st.lists(size, min_size=len(tokens), max_size=len(tokens)))
    spans = [Span(start, start + length) for start, length in marks]
    text = shaded_text(tokens, influence, spans, width, NATS)
    assert "".join(piece for piece, _, _ in pieces(text)) == "".join(tokens)
    inside = {at for start, stop in spans for at in range(start, stop)}
    place = 0
    for piece, _, marked in pieces(text):
        assert {at in inside for at in range(place, place + len(piece))} <= {marked}
        place += len(piece)


def test_the_window_holds_the_strongest_tokens_and_whole_words() -> None:
    tokens = [piece for _ in range(100) for piece in (" wor", "d")]
    influence = [0.0] * 200
    influence[120] = influence[123] = 0.004
    text = shaded_text(tokens, influence, [], 20, NATS)
    window = "".join(piece.text for group in text.window for piece in group.pieces)
    assert text.num_hidden > 150
    assert [p.level for group in text.window for p in group.pieces].count(6) == 2
    assert re.fullmatch(r"( word)+", window)


def test_a_short_text_is_shown_whole() -> None:
    text = shaded_text(["a "] * 22, [0.001] * 22, [], 20, NATS)
    assert (text.before, text.after, text.num_hidden) == ((), (), 0)


# --- numbers and pictures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "value", "shown"),
    [
        (0.0031, 0.0031, "+0.00310 nats"),
        (0.0031, -0.0001, "−0.00010 nats"),
        (2.5, -1.25, "−1.25 nats"),
        (3.1e-4, 3.1e-4, "+310 ×10⁻⁶ nats"),
        (3.1e-6, -1.2e-7, "−0.12 ×10⁻⁶ nats"),
        (3.1e-6, 1e-9, "+<0.01 ×10⁻⁶ nats"),
        (3.1e-8, 3.1e-8, "+31.0 ×10⁻⁹ nats"),
        (0.0, 0.0, "0.0 nats"),
    ],
)
def test_scores_are_legible_at_any_size(largest: float, value: float, shown: str) -> None:
    assert Nats.of(largest).full(value) == shown


def test_a_unit_that_is_settled_stays() -> None:
    assert Nats.of(0.0084, exponent=-6).full(0.0084) == "+8,400 ×10⁻⁶ nats"


def test_plain_numbers_keep_their_significant_digits() -> None:
    shown = [plain(x) for x in (0.1, -24.5, 1234567, 8.1e-5, 0, math.inf, math.nan)]
    assert shown == ["0.100", "−24.5", "1.23×10⁶", "8.10×10⁻⁵", "0", "∞", "not a number"]
    assert change_in_probability(0.01) == "1.0 % more probable"
    assert change_in_probability(-0.01) == "1.0 % less probable"
    assert [correlation(r) for r in (-0.5, 0.99999, 1.0)] == ["−0.500", "0.9999", "1.000"]
    assert change_in_probability(3) == "20 times as probable"


def test_bars_of_the_strip_are_in_proportion_and_on_the_side_of_their_sign() -> None:
    strip = layer_strip(Rows.of(LAYERS), [0.002, -0.001, 0.0005], NATS)
    first, second, third = strip.bars
    assert (first.positive, second.positive, third.positive) == (True, False, True)
    assert first.y + first.height == pytest.approx(strip.middle)
    assert second.y == pytest.approx(strip.middle)
    assert first.height == pytest.approx(2 * second.height, abs=0.2)
    assert first.hint == "0 up: +0.00200 (57 %)"
    assert [text for _, text in strip.labels] == ["0", "1"]


def test_many_layers_become_one_bar_a_block() -> None:
    names = [f"h.{block}.mlp.{part}" for block in range(20) for part in ("c_fc", "c_proj")]
    rows = Rows.of(names)
    assert rows.labels[:2] == ("block 0", "block 1")
    assert rows.sums([1.0] * 40) == [2.0] * 20
    assert len(layer_strip(rows, [1.0] * 40, NATS).bars) == 20


def test_a_layer_name_is_shortened_to_its_block_and_role() -> None:
    assert short("model.layers.3.mlp.up_proj") == "3 up"
    assert short("transformer.h.11.mlp.c_fc") == "11 c_fc"
    assert short("lm_head") == "lm_head"


def test_the_token_map_is_a_png_with_the_last_layer_on_top() -> None:
    grid = [[0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]
    header, encoded = token_map(Rows.of(LAYERS), grid).split(",")
    content = base64.b64decode(encoded)
    assert header == "data:image/png;base64"
    assert struct.unpack(">II", content[16:24]) == (2, 3)
    at = content.index(b"IDAT")
    [size] = struct.unpack(">I", content[at - 4 : at])
    pixels = zlib.decompress(content[at + 4 : at + 4 + size])
    assert pixels == bytes([0, 0, 6, 0, 6, 6, 0, 6, 12])  # a filter byte before each row


# --- what is shown and what is flagged ---------------------------------------------------------


def test_neighbours_come_by_rank_and_no_more_than_asked() -> None:
    rows = [row(rank=rank, sign=sign) for sign in "-+" for rank in (3, 1, 2, 5, 4)]
    page = Page(document(evidence(*rows), 4))
    assert [one["id"] for one in page.all("article")] == [
        *(f"q1p{rank}" for rank in range(1, 5)), *(f"q1n{rank}" for rank in range(1, 5)),
    ]  # fmt: skip


def test_near_duplicates_are_one_entry_with_the_others_folded_below_it() -> None:
    alike = [row(rank=1), row(rank=2, group=7), row(rank=3, group=10), row(rank=4, group=10)]
    page = Page(document(evidence(*alike, row(rank=5)), 2))
    assert [one["id"] for one in page.all("article")] == ["q1p1", "q1p3", "q1p4", "q1p2"]
    assert ["duplicates" in one["inside"] for one in page.all("article")] == [
        False, True, True, False,
    ]  # fmt: skip
    [folded] = page.all("details", "duplicates")
    assert "open" not in folded
    assert "+2 near duplicates +0.00133 to +0.00100" in " ".join(folded["text"].split())


@pytest.mark.parametrize(("sparsity", "flagged"), [(0.67, True), (2 / 3, False), (0.2, False)])
def test_a_sequence_carried_by_one_token_is_flagged(sparsity: float, flagged: bool) -> None:
    page = Page(document(evidence(row(sparsity=sparsity)), 10))
    assert bool(page.all("article", "spurious")) == flagged
    assert bool(page.all("p", "flag")) == flagged


def test_ranks_of_the_baselines_stand_beside_ours() -> None:
    page = Page(document(evidence(row(), row(rank=2)), 10))
    shown = [" ".join(one["text"].split()) for one in page.all("dl", "ranks")]
    assert shown[0] == "EK-FAC#1 Gradient dot#2 TF-IDF#3 BM25#5"
    assert shown[1] == "EK-FAC#2 Gradient dot– TF-IDF– BM25–"


def test_what_a_query_expects_is_told_with_every_rank_and_marked_beside_it() -> None:
    rows = (row(), row(rank=2, documents=["ts-9"], sequence="ts-9"))
    found = evidence(*rows, expected={"queries": {"lily": expectation("ts-9")}})
    page = Page(document(found, 10))
    [told] = page.all("details", "expected")
    words = " ".join(told["text"].split())
    for part in (
        "1 of 2 in the first 10, 1 not scored: the filter kept them out", "rank byEK-FACBM25",
        "ts-9#4#8", "lostnot scorednot scored", "recall at 1050 %50 %",
        "reciprocal rank0.250.12",
    ):  # fmt: skip
        assert part in words.replace("> ", ">"), words
    shown = [element["text"].strip() for element in page.all("span", "source")]
    assert shown == ["ts-1@0", "expected ts-9"]
    assert not Page(document(evidence(), 10)).all("details", "expected")


def test_tags_stand_beside_a_query_and_choose_among_them() -> None:
    found = evidence()
    tagged = dict(found.queries[0]) | {"tags": ["it's", "b"], "generated": True}
    other = tagged | {"name": "other", "tags": ["b"], "generated": None}
    page = Page(document(replace(found, queries=[tagged, other, found.queries[0]]), 10))
    buttons = [
        (json.loads(e["data-tag"]), e["text"]) for e in page.all("button") if "data-tag" in e
    ]
    assert buttons == [("", "All 3"), ("it's", "it's 1"), ("b", "b 2")]
    for tag in ("li", "section"):
        carried = [json.loads(e["data-tags"]) for e in page.all(tag) if "data-tags" in e]
        assert carried == [["it's", "b"], ["b"], []]
    measures = [element["text"] for element in page.all("p", "measure")]
    assert ["generated" in text for text in measures] == [True, False, False]
    assert not [e for e in Page(document(evidence(), 10)).all("button") if "data-tag" in e]


def test_a_query_without_neighbours_and_without_extras_is_still_a_page() -> None:
    bare = evidence(row(), metrics={}, recall={}, baselines=[])
    query = {"name": "alone", "prompt": "Hi", "completion": "\n"}
    html = document(replace(bare, queries=[*bare.queries, query]), 10)
    assert len(Page(html).all("p", "none")) == 3


def test_a_long_prompt_shows_its_end_first_and_loses_nothing() -> None:
    found = evidence()
    prompt = "".join(f"word{at} " for at in range(300))
    query = dict(found.queries[0]) | {"prompt": prompt}
    page = Page(document(replace(found, queries=[query]), 10))
    [block] = page.all("blockquote")
    [summary] = [one for one in page.all("summary") if "earlier characters" in one["text"]]
    assert block["text"].strip().removeprefix(summary["text"]) == prompt + " Lily."


def test_verdicts_grade_what_was_measured_and_say_nothing_of_what_was_not() -> None:
    assert verdicts({}, {"method": "none", "recall": 1.0}, {}) == []
    found = {
        one.name: one.grade
        for one in verdicts(
            {
                "split_half": {"pearson": 0.7},
                "layers": {"a": {"trace_ratio": 1.0}, "b": {"trace_ratio": 1.004}},
                "dampings": {"ekfac@0.01": {"spearman": 0.65}, "ekfac@1": {"spearman": 0.95}},
                "baselines": {"bm25": {"spearman": 0.1}},
                "expected": {
                    **{"num_queries": 2, "num_expected": 5, "num_filtered": 1},
                    "ekfac": {"recall_10": 0.6, "recall_100": 0.8, "mrr": 0.5},
                    "bm25": {"recall_10": 0.2, "recall_100": 0.4, "mrr": 0.25},
                },
            },
            {"method": "tfidf", "recall": 0.95},
            {"pearson_control": 0.97},
        )
    }
    assert found == {
        "Split-half agreement": "poor",
        "Gradients in the eigenbasis": "fair",
        "Low rank against full rank": "fair",
        "Recall of the filter": "good",
        "Order under another damping": "poor",
        "Against BM25": "note",
        "Expected documents found": "fair",
    }


def test_of_queries_that_share_a_subspace_the_page_says_so_and_what_to_raise_first() -> None:
    whole, lost = evidence(), {"layers.0": 0.125, "layers.1": 0.43}
    more = {"subspace": lost, "rescore": {"pearson_control": 0.9}}
    part = evidence(summary=dict(whole.summary) | more)
    assert facts(whole).search == "query gradients of rank 32"
    told = "query gradients of rank 32, up to 43.0 % of them outside the shared subspace"
    assert facts(part).search == told
    assert told in document(part, 10)
    [verdict] = [one for one in facts(part).verdicts if one.name == "Low rank against full rank"]
    assert "raise stream.subspace (or leave it null), then query.rank." in verdict.sentence
    [verdict] = verdicts({}, {}, {"pearson_control": 0.9})
    assert "raise query.rank." in verdict.sentence


def test_what_benchmarks_found_stands_beside_the_scores_and_is_not_called_this_runs() -> None:
    def agreement(pearson: float) -> dict[str, float]:
        return {
            "pearson": pearson,
            "low": pearson - 0.02,
            "high": pearson + 0.03,
            "num_queries": 30,
        }

    rows = [
        {"benchmark": name, "ekfac": agreement(r), "gradient_dot": agreement(r / 2)}
        for name, r in (("concrete", 0.74), ("digits", 0.58))
    ]
    [told] = verdicts({}, {}, {}, rows)
    assert told.grade == "note"
    assert told.value == "r = 0.580 to 0.740"
    assert "Not measured on this model" in told.sentence
    assert "concrete 0.740 (0.720 to 0.770) over 30 queries, digits 0.580 (" in told.sentence
    assert "gradient dot product: 0.370, 0.290." in told.sentence
    assert "gradient dot product: 0.370" in document(replace(evidence(), ground_truth=rows), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_influence": [0.1]}, r"'lily', \+1: 17 tokens with 1 token influences"),
        ({"layers": [0.1]}, "influence of 1 layers, wanted 3"),
        ({"influence": math.nan}, "an influence is not finite"),
        ({"query": "ghost"}, "queries.json has no such query"),
    ],
)
def test_artefacts_that_contradict_each_other_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        document(evidence(row(**change)), 10)


def test_a_run_without_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no query"):
        document(evidence(queries=[]), 10)


def test_ten_queries_of_twenty_long_sequences_stay_under_three_megabytes() -> None:
    text = "and then he saw a big red ball under the tree. " * 34  # 400 tokens of 4 characters
    found = evidence()
    queries = [dict(found.queries[0]) | {"name": f"query {at}"} for at in range(10)]
    rows = [
        row(query=query["name"], sign=sign, rank=rank, text=text)
        for query in queries
        for sign in "+-"
        for rank in range(1, 11)
    ]
    assert len(rows[0]["tokens"]) == 400
    # Heavy-tailed, as influence is; in an embedded run, a fifth of the tokens gets a shade.
    sparse = [
        one | {"token_influence": [value**9 * 1e32 for value in one["token_influence"]]}
        for one in rows
    ]
    html = document(replace(found, queries=queries, top=sparse), 10)
    assert html.count("<i class=") > 10_000
    assert len(html.encode()) < 3e6
