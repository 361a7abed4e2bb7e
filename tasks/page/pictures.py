"""Small pictures of the page: the strip of the layers, the profile of a query, the token map."""

import base64
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from tasks.page.numbers import Nats, percent, ratio
from tasks.page.shading import LEVELS, levels

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_MOST_BARS = 36  # more are drawn as one bar a block: thinner bars cannot be told apart
_RED, _TEAL = (214, 69, 56), (12, 138, 136)  # of the token map, over either background


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar around a zero line, in pixels of its picture; the sign is its direction."""

    x: float
    y: float
    width: float
    height: float
    positive: bool
    hint: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Bars around a zero line, with labels (x, text) under them; pixels."""

    width: float
    middle: float
    height: float
    bars: tuple[Bar, ...]
    labels: tuple[tuple[float, str], ...]
    hint: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Layers as the pictures show them: one by one, or summed by block where there are many."""

    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, layers: Sequence[str]) -> "Rows":
        """The layers in their order; by block from the 37th on."""
        blocks = [block(name) for name in layers]
        if len(layers) <= _MOST_BARS:
            return cls(
                tuple(short(name) for name in layers),
                tuple(blocks),
                tuple((index,) for index in range(len(layers))),
            )
        members: dict[str, list[int]] = {}
        for index, name in enumerate(blocks):
            members.setdefault(name, []).append(index)
        labels = tuple(f"block {name}" if name.isdigit() else name for name in members)
        return cls(labels, tuple(members), tuple(tuple(rows) for rows in members.values()))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Values of the layers, summed to rows."""
        return [sum(values[index] for index in rows) for rows in self.members]


def block(layer: str) -> str:
    """The first number in a layer's name ("model.layers.3.mlp.up_proj" -> "3"), or the name."""
    found = _BLOCK.search(layer)
    return found.group(1) if found else layer


def short(layer: str) -> str:
    """ "model.layers.3.mlp.up_proj" -> "3 up"; a name without a number stays as it is."""
    found = _BLOCK.search(layer)
    role = layer.rpartition(".")[2].removesuffix("_proj")
    return f"{found.group(1)} {role}" if found and found.group(1) != role else layer


def layer_strip(rows: Rows, influence: Sequence[float], nats: Nats) -> Strip:
    """Influence of a sequence by layer, one bar each, up for + and down for -."""
    values = rows.sums(influence)
    total = sum(abs(value) for value in values)
    scale = _Scale.of(values, 34.0)
    pitch, gap = (9.0, 5.0) if len(values) <= 24 else (6.0, 2.0)
    bars: list[Bar] = []
    labels: list[tuple[float, str]] = []
    x = 0.0
    for name, group in groupby(range(len(values)), key=lambda row: rows.blocks[row]):
        left = x
        for row in group:
            share = percent(ratio(values[row], total), 0)
            hint = f"{rows.labels[row]}: {nats.signed(values[row])} ({share})"
            bars.append(scale.bar(x, pitch - 1, values[row], hint))
            x += pitch
        labels.append(((left + x - 1) / 2, name[:6] if name.isdigit() else ""))
        x += gap
    at = max(range(len(values)), key=lambda row: abs(values[row]), default=None)
    strongest = f"; the strongest is {rows.labels[at]}" if at is not None else ""
    hint = f"Influence by layer{strongest}"
    return Strip(x - gap, scale.middle, scale.height, tuple(bars), _sparse(labels), hint)


def profile(scores: Sequence[float], nats: Nats) -> Strip:
    """Scores of a query from the largest to the smallest: how concentrated is its influence?"""
    scale = _Scale.of(scores, 28.0)
    bars = tuple(
        scale.bar(4.0 * at, 3.0, score, nats.signed(score))
        for at, score in enumerate(sorted(scores, reverse=True))
    )
    width = 4.0 * max(1, len(bars))
    return Strip(width, scale.middle, scale.height, bars, (), "Scores of the sequences shown")


def token_map(rows: Rows, influence: Sequence[Sequence[float]]) -> str:
    """Layer × token influence as the data URI of a PNG, the last layer on top, a pixel a cell."""
    if len({len(row) for row in influence}) != 1:
        raise ValueError("the rows of a token map have unequal lengths: wanted one cell a token")
    cells = np.asarray(influence, dtype=np.float64)
    summed = np.stack([cells[list(members)].sum(axis=0) for members in reversed(rows.members)])
    palette = (LEVELS + levels(summed)).astype(np.uint8)
    picture = _png(palette)
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


@dataclass(frozen=True, slots=True)
class _Scale:
    """Bars of both signs in one height; the zero line stands where they need it."""

    height: float
    middle: float
    per_nat: float

    @classmethod
    def of(cls, values: Sequence[float], height: float) -> "_Scale":
        high, low = max([0.0, *values]), min([0.0, *values])
        if high == low:
            return cls(height, height / 2, 0.0)
        return cls(height, round(height * high / (high - low), 1), height / (high - low))

    def bar(self, x: float, width: float, value: float, hint: str) -> Bar:
        # Half a pixel stays visible, so that a small bar is not taken for a missing layer.
        length = max(0.5, round(abs(value) * self.per_nat, 1))
        y = round(self.middle - length if value >= 0 else self.middle, 1)
        return Bar(x, y, width, length, value >= 0, hint)


def _sparse(labels: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Labels at least 14 pixels apart."""
    kept: list[tuple[float, str]] = []
    for x, text in labels:
        if text and (not kept or x - kept[-1][0] >= 14):
            kept.append((x, text))
    return tuple(kept)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A palette image: index 0 is the deepest teal, 6 is clear, 12 the deepest red."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    colours = [(_TEAL if at < LEVELS else _RED) for at in range(2 * LEVELS + 1)]
    alpha = [round(255 * (abs(at - LEVELS) / LEVELS) ** 0.75) for at in range(2 * LEVELS + 1)]
    chunks: Mapping[bytes, bytes] = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": b"".join(bytes(colour) for colour in colours),
        b"tRNS": bytes(alpha),
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
