"""Checkpoints in half precision, and passes in bfloat16: what changes, and by how much.

Drawing the labels of the pseudo-gradients anew moves these scores by more (correlations .96 to .99)
than bfloat16 does.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tasks.models import load_model
from tests.small_run import MODEL, SECTIONS
from tests.test_curvature_stages import make, scores

NARROW = [torch.bfloat16, torch.float16]


def checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """The embedded checkpoint with its weights in another dtype."""
    shutil.copytree(MODEL, folder)
    load_model(MODEL, "cpu", torch.float32).to(dtype).save_pretrained(folder)
    return folder


def all_scores(root: Path, dtype: str, path: Path) -> torch.Tensor:
    """Every candidate scored by every query, [q n], by the stages from `train` to `score`."""
    root.mkdir()
    folder = make(
        root,
        train={"checkpoint": {"path": str(path)}},
        filter={"method": "none"},
        layers=["*.down_proj"],
        # More sequences than elsewhere: bfloat16 draws a few other labels, of which none may weigh.
        factors={"sequences": 40, "seed": 0},
        correct={"sequences": 40, "seed": 1},
        runtime=SECTIONS["runtime"] | {"dtype": dtype, "tokens_per_batch": 1024},
    )
    found = scores(folder)
    rows = sorted({row for _, _, row in found})
    return torch.tensor([[found["ekfac", q, row] for row in rows] for q in ("park", "toy")])


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_checkpoint_is_loaded_in_the_dtype_of_the_pass(tmp_path, stored, dtype):
    model = load_model(checkpoint(tmp_path / "checkpoint", stored), "cpu", dtype)
    original = dict(load_model(MODEL, "cpu", torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original[name].to(stored).to(dtype))


def test_a_run_in_bfloat16_from_a_narrow_checkpoint_scores_as_one_in_float32(tmp_path):
    """All stages, at rank 4: no decomposition may be left in a dtype that torch has none for."""
    wide = all_scores(tmp_path / "wide", "float32", MODEL)
    path = checkpoint(tmp_path / "checkpoint", torch.bfloat16)
    narrow = all_scores(tmp_path / "narrow", "bfloat16", path)
    for one, other in zip(wide, narrow, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.99
