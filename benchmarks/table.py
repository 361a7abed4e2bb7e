"""What was measured, kept in docs/engine/*.jsonl, and the tables and figures made of it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import growth
from influence.products import multiplies_by_onednn

ROOT = Path(__file__).parent.parent
FOLDER, PAGE, FIGURE = Path("docs/engine"), Path("docs/results.md"), Path("docs/engine/engine.png")
PEER = "kronfluence"  # the one whose runs have the plain names
OPEN, CLOSE = "<!-- engine -->", "<!-- /engine -->"
Line = Mapping[str, Any]
TOLD = {
    "factors": "A, S with sampled labels",
    "lambda": "Λ",
    "self": "self-influence",
    "query": "query: gradient, solve, rank 32 (a query token)",
    "stream 8": "stream, 8 queries of rank 32",
    "tokens 8": "the same with token scores",
    "stream 8 full": "the same at full rank",
    "stream 64": "stream, 64 queries of rank 32",
    "stream 1024": "stream, 1024 queries of rank 32",
    "stream 1024 shared": "the same in a subspace of 256 columns, not exact",
}


def machine() -> str:
    """What it was measured on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    told = getattr(torch.cpu, "get_capabilities", dict)()
    name = told.get("cpu_name") or platform.machine()
    kernels = "oneDNN" if multiplies_by_onednn(*torch.empty(2, 1024, 1024)) else "PyTorch's choice"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, products by {kernels}"


def keep(root: Path, lines: Sequence[Line]) -> Path:
    """Write the lines of one run; of an earlier one here, what this one did not measure stays.

    So that phases, and their times and memory, can be measured apart.
    """
    about = lines[0]
    name = f"{about['model']}-{about['length']}-{'+'.join(about['layers'])}"
    if (peer := about.get("peer", PEER)) != PEER:
        name += f"-{peer}"
    if about.get("without_onednn"):
        name += "-without-onednn"
    path = root / FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept: dict[tuple[str, int], Line] = {}
    for line in [*map(json.loads, earlier), *lines]:
        if line["machine"] == about["machine"]:
            kept[_told(line)] = {**kept.get(_told(line), {}), **line}
    order = {phase: at for at, phase in enumerate(TOLD)}
    keys = sorted(kept, key=lambda key: (order.get(key[0], len(order)), key))
    text = "".join(json.dumps(kept[key], ensure_ascii=False) + "\n" for key in keys)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _told(line: Line) -> tuple[str, int]:
    """The phase that a line tells of, over how many sequences; or what else it tells of."""
    if "phase" in line:
        return line["phase"], line["sequences"]
    return ("agreement" if "agreement" in line else "disk"), 0


def read(root: Path) -> dict[str, list[Line]]:
    """The lines of every setting, by file name."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((root / FOLDER).glob("*.jsonl"))
        if path.stem != growth.NAME
    }


def block(root: Path) -> str:
    """What stands between the markers: the phases of every setting, and how they grow."""
    parts = [render(read(root))]
    if (root / FOLDER / f"{growth.NAME}.jsonl").exists():
        parts.append(growth.render(growth.read(root / FOLDER)))
    return "\n\n".join(parts)


def write(root: Path) -> None:
    """Bring the page's block and the figures up to date."""
    page = root / PAGE
    text = page.read_text(encoding="utf-8")
    page.write_text(with_block(text, block(root)), encoding="utf-8")
    if runs := read(root):
        draw(runs, root / FIGURE)
    if lines := growth.read(root / FOLDER):
        growth.draw(lines, root / FOLDER / f"{growth.NAME}.png")


def with_block(text: str, block: str) -> str:
    """The page with what stands between the markers replaced.

    Raises:
        ValueError: if the markers are not there, once each and in order.
    """
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise ValueError(f"{PAGE} must hold {OPEN} and, after it, {CLOSE}, once each; add them")
    before, rest = text.split(OPEN)
    return f"{before}{OPEN}\n{block}\n{CLOSE}{rest.split(CLOSE)[1]}"


def render(runs: Mapping[str, Sequence[Line]]) -> str:
    """A table for each setting."""
    if not runs:
        return "Nothing has been measured yet."
    parts = []
    for name, lines in runs.items():
        about = lines[0]
        peer, repeats = _first(lines, "peer", PEER), _first(lines, "repeats", 0)
        parts += [
            f"### {name}",
            "",
            f"{about['machine']}, {about['threads']} thread; medians of "
            f"{repeats} interleaved repeats [smallest, largest].",
            "",
            f"| phase | sequences | fb a token | {peer} | ours ÷ {peer} "
            "| peak above the model, MiB |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        agreement: dict[str, float] = {}
        for line in lines:
            agreement |= line.get("agreement", {})
            if "phase" in line:
                cells = [
                    _phase(line, repeats), str(line["sequences"]),
                    *(_cell(line, key) for key in ("fb", "peer_fb", "over_peer")), _memory(line),
                ]  # fmt: skip
                parts.append(f"| {' | '.join(cells)} |")
        for line in lines:
            if "disk_mib" in line:
                told = ", ".join(
                    f"{key} {value:,.0f} against {line['peer_disk_mib'][key]:,.0f}"
                    for key, value in line["disk_mib"].items()
                )
                parts += ["", f"On disk, MiB, ours against {peer}: {told}."]
        for line in lines:
            if "lost" in line:
                parts += [
                    "",
                    "What the subspace of 256 columns leaves out of 64 queries, prepared from "
                    f"random tokens: {line['lost']:.2f} of their norm.",
                ]
        if agreement:
            told = ", ".join(f"{key} {value:.0e}" for key, value in agreement.items())
            parts += ["", f"Relative difference to {peer} (Frobenius, worst layer): {told}."]
        parts.append("")
    return "\n".join(parts).rstrip()


def _first(lines: Sequence[Line], key: str, default: Any) -> Any:
    """Of the first line that says; one that tells of memory alone does not say all."""
    return next((line[key] for line in lines if key in line), default)


def _phase(line: Line, repeats: int) -> str:
    """In words, and what of it is not as in the other lines."""
    told = TOLD[line["phase"]]
    if waiting := line.get("waiting_gib"):
        told += f", {waiting} GiB of gradients waiting"
    if (own := line.get("repeats", repeats)) != repeats:
        told += f"; {own} repeats"
    return told


def _cell(line: Line, key: str) -> str:
    if key not in line:
        return "–"
    return f"{line[key]:.2f} [{line[f'{key}_low']:.2f}, {line[f'{key}_high']:.2f}]"


def _memory(line: Line) -> str:
    ours, theirs = line.get("peak_mib"), line.get("peer_peak_mib")
    told = [f"{value:,.0f}" for value in (ours, theirs) if value is not None]
    return " against ".join(told) or "–"


def draw(runs: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Cost of each phase, both sides, a panel a setting."""
    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 4), squeeze=False)
    for panel, (name, lines) in zip(panels[0], runs.items(), strict=False):
        phases = [line for line in lines if "fb" in line]
        at = range(len(phases))
        peer = _first(lines, "peer", PEER)
        panel.barh([x + 0.2 for x in at], [p["fb"] for p in phases], 0.4, label="influence")
        peers = [p.get("peer_fb", 0.0) for p in phases]
        panel.barh([x - 0.2 for x in at], peers, 0.4, label=peer)
        panel.set_yticks(list(at), [p["phase"] for p in phases])
        panel.invert_yaxis()
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set_xlabel("forward and backward passes, a token")
        panel.set_title(name)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
