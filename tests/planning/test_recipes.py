"""The recipes of docs/plan.md are what the planner says: by arithmetic, on hardware described.

Where one of these tests fails, it shows the lines that the page should have.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tasks.params import RunParams
from tasks.planning.corpus import CorpusSize
from tasks.planning.estimate import BARE, BASE
from tasks.planning.hardware import described
from tasks.planning.model import ModelSizes, model_sizes
from tasks.planning.planned import Planned, Sizes, StageCost
from tasks.planning.seconds import reckoned
from tasks.planning.stages import stage_costs
from tasks.planning.table import memory
from tasks.progress import duration
from tests.planning.test_plan import ROOMY
from tests.small_run import ROOT, SECTIONS

HARDWARE = "tflops=400,memory=80GiB,host_gflops=500,disk_gbps=2"
LENGTH, QUERY_LENGTH, QUERIES = 512, 32, 10
# Width, width of the MLP, blocks, heads; tokens of a batch and GiB for layers.
LLAMAS: dict[str, tuple[tuple[int, int, int, int], int, float]] = {
    "1B": ((2048, 8192, 16, 32), 4096, 8),
    "8B": ((4096, 14336, 32, 32), 2048, 16),
    "70B": ((8192, 28672, 80, 64), 512, 64),
}


def sections(folder: Path, tokens: int, layer_memory: float) -> dict[str, Any]:
    return SECTIONS | {
        "train": {"checkpoint": {"path": str(folder)}},
        "tokenize": {"mode": "pack", "context": LENGTH, "bos": True, "eos": True},
        "filter": {"method": "tfidf", "terms": "words", "top": 10_000, "audit": 1000, "seed": 0},
        "factors": {"sequences": 10_000, "seed": 0},
        "correct": {"sequences": 10_000, "seed": 1},
        "query": SECTIONS["query"] | {"rank": 32},
        "score": {"top": 100, "control": 100, "seed": 0},
        "validate": {"split_half": 1000, "sample": 1000, "seed": 0},
        "runtime": SECTIONS["runtime"] | {
            "dtype": "bfloat16", "workers": 1, "shards": 8, "tokens_per_batch": tokens,
            "layer_memory": layer_memory,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Planned]:
    found = {}
    for name, ((width, inner, blocks, heads), tokens, layer_memory) in LLAMAS.items():
        folder = tmp_path_factory.mktemp(name)
        LlamaConfig(
            vocab_size=128256, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
            num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=name == "1B",
        ).save_pretrained(folder)  # fmt: skip
        params = RunParams.model_validate(sections(folder, tokens, layer_memory))
        model = model_sizes(params, folder, folder / "none", LENGTH)
        found[name] = planned(params, model, 10**7)
    return found


def planned(params: RunParams, model: ModelSizes, sequences: int) -> Planned:
    corpus = CorpusSize(sequences, sequences, LENGTH * sequences, exact=False, told="")
    sizes = Sizes(model, corpus, QUERIES, QUERY_LENGTH, BARE, BASE)
    return Planned(params, sizes, described(HARDWARE, ROOMY))


def column(name: str, recipe: Planned) -> list[str]:
    costs = {each.stage: each for each in stage_costs(recipe)}
    seconds = reckoned(recipe, list(costs.values()))

    def took(stage: str) -> str:
        told = duration(seconds[stage] or 0.0)
        return f"{told}, {costs[stage].groups}" if costs[stage].groups > 1 else told

    def device(*stages: str) -> str:
        return memory(max(costs[stage].device for stage in stages))

    curvature = sum(costs[stage].disk for stage in ("factors", "eigen", "correct"))
    _, tokens, layers = LLAMAS[name]
    return [
        f"{tokens}, {layers}",
        *(took(stage) for stage in ("factors", "eigen", "correct", "stream", "score", "validate")),
        device("factors", "correct", "query", "stream"), device("score"), device("validate"),
        memory(curvature), memory(costs["factors"].work), memory(costs["score"].work),
    ]  # fmt: skip


ROWS = (
    "`tokens_per_batch`, `layer_memory`", "factors: time, groups", "eigen: time",
    "correct: time, groups", "stream: time", "score: time, groups", "validate: time, groups",
    "device memory of fit, query and stream", "device memory of score",
    "device memory of validate", "curvature on disk", "partial files of factors",
    "partial files of score",
)  # fmt: skip


def test_the_recipes_are_those_of_the_planner(recipes):
    columns = [column(name, recipe) for name, recipe in recipes.items()]
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    lines = [f"| {' | '.join(row)} |" for row in zip(ROWS, *columns, strict=True)]
    assert not "\n".join(line for line in lines if line not in page)


def test_larger_corpora_take_what_the_page_says(recipes):
    params, model = recipes["1B"].params, recipes["1B"].sizes.model
    lines = []
    for power in (7, 8, 9):
        run = planned(params, model, 10**power)
        costs: dict[str, StageCost] = {each.stage: each for each in stage_costs(run)}
        tokenize, filter = costs["tokenize"], costs["filter"]
        cells = [
            f"10{'⁷⁸⁹'[power - 7]}", f"{memory(tokenize.host)}, {memory(tokenize.disk)}",
            memory(filter.host), f"{run.num_candidates:,}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    assert not "\n".join(line for line in lines if line not in page)
