"""The example of README.md runs as it stands, with nothing but torch, einops and jaxtyping."""

import re
import subprocess
import sys
from pathlib import Path

from tests.test_architecture import DOORS

BARE = {"torch", "einops", "jaxtyping", "numpy"}  # torch brings NumPy in where it finds it

# What stands before the example: a model of one's own and sequences for it.
BEFORE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(f"{name} is more than the mathematics needs")

sys.meta_path.insert(0, Refused())

from types import SimpleNamespace

import torch
from torch import nn
from influence.sequences import TokenBatch

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.block = nn.ModuleDict({"mlp": mlp})
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return SimpleNamespace(logits=self.head(self.block["mlp"](self.embed(input_ids))))

def sequences(ids):
    tokens = [torch.randint(7, (5,)) for _ in ids]
    return TokenBatch.collate(ids, tokens, [torch.arange(5) > 0 for _ in ids])

torch.manual_seed(0)
model, fit_batches = Model(), [sequences(range(8))]
batches, num_training_sequences = [sequences(range(8, 12)), sequences(range(12, 15))], 15
prompt_ids, completion_ids = (1, 2), (3, 4)
shapes, grids = [], {}
"""
# What the comments of the example say of it.
CHECK = """
    shapes.append(tuple(scores.shape))
    grids |= told.grids
assert shapes == [(1, 4, len(layers)), (1, 3, len(layers))], shapes
assert len(grids) == 7 and all(grid.isfinite().all() for grid in grids.values())
assert coverage.share > 0
"""


def example(root: Path) -> str:
    text = (root / "README.md").read_text(encoding="utf-8").split("From Python, without any")[1]
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_example_runs_without_the_workflow(root: Path) -> None:
    refused = {*DOORS, "tasks", "flows"} - BARE
    code = f"REFUSED = {refused!r}\n{BEFORE}{example(root).rstrip()}\n{CHECK}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
