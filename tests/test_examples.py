"""The larger shipped runs, cut down to seconds: every stage of them, and what they are about."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import store
from tasks.params import RunParams
from tasks.planning.estimate import run_sizes
from tasks.workspace import STAGES, StageContext, prepare, publish
from tests.small_run import ROOT

UNTIL_SCORE = STAGES[: STAGES.index("score") + 1]
SMALL: Mapping[str, Any] = {
    "factors": {"sequences": 12, "seed": 0},
    "correct": {"sequences": 12, "seed": 1},
    "score": {"top": 3, "control": 2, "seed": 0},
    "report": {"title": "small", "top": 3},
}
TINY = {"width": 16, "layers": 2, "heads": 2, "vocabulary": 400, "context": 96, "steps": 4}


def shipped(run: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"params/{run}.yaml").read_text(encoding="utf-8")) | SMALL


def run_stages(root: Path, run: str, sections: Mapping[str, Any], stages: tuple[str, ...]) -> None:
    params = RunParams.model_validate(sections)
    for stage in stages:
        context = StageContext(run, stage, params, root, fingerprint=f"{stage}-0123456789ab")
        prepare(context)
        import_module(context.module).run(context)
        publish(context)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with the run `wikipedia`, cut down, in it."""
    root = tmp_path_factory.mktemp("examples")
    (root / "data").symlink_to(ROOT / "data")
    sections = shipped("wikipedia")
    sections["train"]["scratch"] |= TINY
    sections["tokenize"]["context"] = 64
    sections["corpus"]["limit"] = 9  # the ninth document is the article on a query's Gershwin
    sections["query"]["rank"] = 4
    (root / "queries.jsonl").write_text(
        "".join(
            line
            for line in (ROOT / sections["query"]["path"]).read_text("utf-8").splitlines(True)
            if any(f'"{title}"' in line for title in ("Albedo", "An American in Paris"))
        )
    )
    sections["query"]["path"] = "queries.jsonl"
    run_stages(root, "wikipedia", sections, UNTIL_SCORE)
    return root


def asked(root: Path, run: str) -> set[str]:
    """The queries of which there are scores; what they expect was found in the corpus before."""
    scores = store.read_table(root / f"artifacts/{run}/score/scores.parquet", ["query"])
    return set(scores["query"].to_pylist())


def test_wikipedia_trains_its_model_and_scores_its_articles(folder):
    assert asked(folder, "wikipedia") == {"albedo_range", "paris_gershwin"}


def test_chat_is_planned_with_the_template_that_its_params_give(folder):
    """The checkpoint that it trains on has none."""
    sections = shipped("chat")
    sizes, tokenizer = run_sizes(folder, RunParams.model_validate(sections), folder / "none")
    assert sizes.corpus.num_sequences >= 504
    assert tokenizer is not None
    assert tokenizer.chat_template == sections["train"]["finetune"]["chat_template"]


def test_chat_trains_that_model_on_and_scores_its_conversations(folder):
    sections = shipped("chat")
    sections["train"]["finetune"] |= {"steps": 4}
    sections["tokenize"]["context"] = 96
    sections["query"]["rank"] = 4
    run_stages(folder, "chat", sections, UNTIL_SCORE)
    assert len(asked(folder, "chat")) == 10
