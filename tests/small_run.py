"""A small run in a folder of its own, for tests of single stages without Prefect or DVC."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.params import RunParams
from tasks.workspace import StageContext, prepare, publish

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "data/models/stories260K"

SECTIONS: dict[str, Any] = {
    "train": {"checkpoint": {"path": str(MODEL)}},
    "corpus": {
        "path": "corpus.jsonl",
        "text": "text",
        "separator": None,
        "id": "id",
        "limit": None,
    },
    "tokenize": {"mode": "document", "context": 64, "bos": True, "eos": False},
    "layers": ["mlp"],
    "filter": {"method": "tfidf", "terms": "tokens", "top": 2, "audit": 3, "seed": 0},
    "factors": {"sequences": 8, "seed": 0},
    "correct": {"sequences": 8, "seed": 1},
    "query": {"path": "queries.jsonl", "damping": {"ratio": 0.1}, "damping_grid": [], "rank": 4},
    "stream": {"self_influence": False, "subspace": None},
    "score": {"top": 2, "control": 2, "seed": 0},
    "validate": {"split_half": 2, "sample": 2, "seed": 0},
    "report": {"title": "small", "top": 2},
    "runtime": {
        "device": "cpu",
        "runner": "threads",
        "address": None,
        "workers": 2,
        "gpus_per_task": 0,
        "tokens_per_batch": 256,
        "layer_memory": "auto",
        "shards": 3,
        "dtype": "float32",
    },
}


def stage_context(root: Path, stage: str, **sections: Any) -> StageContext:
    """The context of one stage, its folders made; `sections` replace those above."""
    params = RunParams.model_validate(SECTIONS | sections)
    context = StageContext("small", stage, params, root, fingerprint=f"{stage}-0123456789ab")
    prepare(context)
    return context


def run_stage(root: Path, stage: str, module: Any, **sections: Any) -> Path:
    """Run one stage and return its published folder."""
    context = stage_context(root, stage, **sections)
    module.run(context)
    publish(context)
    return context.published


def write_lines(path: Path, lines: list[Mapping[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
