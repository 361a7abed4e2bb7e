"""A mixture of experts through the stages of a run, from a checkpoint as transformers writes it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tasks import correct, eigen, factors, filter, query, score, store, stream, tokenize, train
from tasks.halves import split_half
from tasks.health import layer_health
from tests.influence import models
from tests.small_run import MODEL, SECTIONS, run_stage, stage_context, write_lines

STAGES = {
    "train": train, "tokenize": tokenize, "filter": filter, "factors": factors, "eigen": eigen,
    "correct": correct, "query": query, "stream": stream, "score": score,
}  # fmt: skip
NUM_EXPERTS, WIDTH, HIDDEN = 5, 8, 6
BLOCK = "model.layers.0.mlp.experts"
IDLE = [f"{BLOCK}.{NUM_EXPERTS - 1}.{end}" for end in ("gate_up_proj", "down_proj")]
SIZES = [2 * HIDDEN * (WIDTH + 1), WIDTH * (HIDDEN + 1)]  # of an expert's two matrices with biases
TEXTS = ["Once upon a time there was a dog.", "The cat sat.", "Lily went to the park.", "Tom ran."]
SECTIONS_OF_RUN: dict[str, Any] = {
    "train": {"checkpoint": {"path": "model"}},
    "query": SECTIONS["query"] | {"rank": None},
    "stream": {"self_influence": True, "subspace": None},
    "runtime": SECTIONS["runtime"] | {"dtype": "float64", "shards": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of a run whose last expert no token is routed to."""
    root = tmp_path_factory.mktemp("mixture")
    config = transformers.GptOssConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=1,
        layer_types=["full_attention"], num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = models.randomise(transformers.GptOssForCausalLM(config), 0).float()
    model.get_parameter("model.layers.0.mlp.router.bias").data[-1] = -1e6
    model.save_pretrained(root / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, root / "model")
    write_lines(root / "corpus.jsonl", [{"id": str(n), "text": t} for n, t in enumerate(TEXTS * 2)])
    asked = {"name": "park", "prompt": "Lily went to", "completion": " bed."}
    write_lines(root / "queries.jsonl", [asked])
    for name, module in STAGES.items():
        run_stage(root, name, module, **SECTIONS_OF_RUN)
    return root


def test_a_params_file_attributes_the_experts_and_names_the_one_that_was_not_reached(root):
    made = root / "artifacts/small"
    summary = store.read_json(made / "score/summary.json")
    coverage = summary["coverage"]
    reached = {
        f"{BLOCK}.{n}.{end}"
        for n in range(NUM_EXPERTS - 1)
        for end in ("gate_up_proj", "down_proj")
    }
    assert set(coverage["attributed"]) == reached == set(summary["damping"]["layers"])
    assert coverage["num_attributed"] == (NUM_EXPERTS - 1) * sum(SIZES)
    assert coverage["share"] == coverage["num_attributed"] / coverage["num_parameters"]
    idle = [left for left in coverage["left_out"] if "no token of the fit" in left["reason"]]
    assert [(left["name"], left["num_parameters"]) for left in idle] == list(
        zip(IDLE, SIZES, strict=True)
    )
    counted = sum(left["num_parameters"] for left in coverage["left_out"])
    assert counted + coverage["num_attributed"] == coverage["num_parameters"]


def test_scores_are_finite_and_those_of_tokens_sum_to_them(root):
    made = root / "artifacts/small"
    scores = store.read_table(made / "score/scores.parquet")["influence"].to_pylist()
    assert torch.tensor(scores).isfinite().all()
    own = store.read_table(made / "score/self_influence.parquet")["self_influence"].to_pylist()
    assert min(own) > 0
    top = store.read_table(made / "score/top.parquet").to_pylist()
    assert top
    for row in top:
        assert sum(row["token_influence"]) == pytest.approx(row["influence"], rel=1e-5)
        assert row["influence_low_rank"] == pytest.approx(row["influence"], rel=1e-6)
        assert len(row["token_influence"]) == len(row["tokens"])


def test_validation_passes_over_an_expert_that_was_not_reached(root):
    made = root / "artifacts/small"
    health = layer_health(made / "factors", made / "eigen", made / "correct")
    assert len(health) == 2 * (NUM_EXPERTS - 1)
    assert not health.keys() & set(IDLE)
    halves = split_half(stage_context(root, "validate", **SECTIONS_OF_RUN))
    assert halves.first.isfinite().all()
    places = [halves.layers.index(name) for name in IDLE]
    assert not halves.first[..., places].any()
