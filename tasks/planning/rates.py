"""What was timed on a machine, and what a stage's process costs there before it works."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.origin import Scratch
from tasks.params import RunParams


@dataclass(frozen=True, slots=True)
class Rates:
    """What was timed here.

    Attributes:
        start: seconds until a stage's process works; its bytes then, `base` if it has a model and
            `bare` if it has none.
        checks: seconds that stage validate takes more to start, and `checks_base` its bytes.
        load: seconds to load the model.
        fb: seconds a token of one forward and backward of training, by one worker.
        by_token: seconds a token by kind of work, all workers at once.
        by_query: seconds a query.
        eigen: seconds of a decomposition by its FLOP.
        flops: FLOP a second of passes, all workers together.
    """

    start: float
    bare: int
    base: int
    checks: float
    checks_base: int
    load: float = 0.0
    fb: float | None = None
    by_token: Mapping[str, float] | None = None
    by_query: float | None = None
    eigen: float | None = None
    flops: float | None = None


def startup(params: RunParams, folder: Path | None) -> dict[str, float]:
    """What a process costs before it works.

    Raises:
        ValueError: if it fails.
    """
    trained = isinstance(params.train, Scratch) and params.train.scratch.architecture
    command = [sys.executable, "-m", "tasks.planning.startup", trained or str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if found.returncode:
        raise ValueError(f"a stage's process does not start: {found.stderr.strip()[-300:]}")
    return json.loads(found.stdout.splitlines()[-1])


def of_start(started: Mapping[str, float]) -> Rates:
    """What `startup` found, and nothing of the work."""
    return Rates(
        started["seconds"], int(started["bare_bytes"]), int(started["bytes"]),
        started["checks_seconds"], int(started["checks_bytes"]),
    )  # fmt: skip
