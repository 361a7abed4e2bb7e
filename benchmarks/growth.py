"""How cost grows with each axis, kept in docs/engine/growth.jsonl; its table and figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

NAME = "growth"
Line = Mapping[str, Any]
SIZES = {
    "tokens": "tokens of a sequence",
    "width": "width of the model",
    "queries": "queries",
    "rank": "rank of the queries",
}


def keep(folder: Path, lines: Sequence[Line]) -> None:
    """Write the lines of one run, in the place of an earlier one's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.jsonl"
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def read(folder: Path) -> list[Line]:
    """Those lines; none if growth was never measured."""
    path = folder / f"{NAME}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(lines: Sequence[Line]) -> str:
    """A table: seconds at each size, and the exponent between size and seconds."""
    parts = [
        "### How cost grows",
        "",
        f"{lines[0]['machine']}, 1 thread, a GPT-2 of 4 blocks and width 256 but where the width "
        "is what varies. Seconds are medians of repeats taken in turn; the exponent is the slope "
        "between their logarithms.",
        "",
        "| what grows | phase | sizes | seconds | exponent |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if "exponent" in line:
            sizes = ", ".join(f"{size:,}" for size in line["sizes"])
            seconds = ", ".join(f"{each:.2f}" for each in line["seconds"])
            cells = [SIZES[line["axis"]], line["phase"], sizes, seconds, f"{line['exponent']:.2f}"]
            parts.append(f"| {' | '.join(cells)} |")
    for line in lines:
        if "two_over_one" in line:
            parts += [
                "",
                f"Two workers of one thread each do {line['two_over_one']:.2f} times what one "
                f"does (model M, {line['phase']} queries).",
            ]
    return "\n".join(parts)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Seconds against size, a panel an axis, both logarithmic."""
    figure, panels = plt.subplots(1, len(SIZES), figsize=(4 * len(SIZES), 3.5))
    for panel, (axis, words) in zip(panels, SIZES.items(), strict=True):
        for line in lines:
            if line["axis"] == axis:
                label = f"{line['phase']}: {line['exponent']:.2f}"
                panel.loglog(line["sizes"], line["seconds"], marker="o", label=label)
                panel.set_xticks(line["sizes"], [str(size) for size in line["sizes"]], minor=False)
        panel.minorticks_off()
        panel.set_xlabel(words)
        if panel.lines:
            panel.legend()
    panels[0].set_ylabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
