"""What a stage took, kept beside its run: what a plan is compared with afterwards.

plans/<run>/ is no stage's output: DVC and git pass it over, and no stage reads it.
"""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tasks import store
from tasks.workspace import FIT_STAGES, STAGES, Context

FOLDER = Path("plans")


@dataclass(frozen=True, slots=True)
class Measured:
    """One execution of a stage.

    Attributes:
        seconds: from the start of its process to its end.
        host: peak bytes of the process, its weights and mapped files included.
        device: peak bytes on GPUs; 0 where none was used.
        disk: bytes that it published.
        whole: whether all of it was computed, and nothing taken up from an earlier attempt.
    """

    seconds: float
    host: int
    device: int
    disk: int
    whole: bool


def plan_folder(root: Path, run: str) -> Path:
    """Where plan and measurements of a run are."""
    return root / FOLDER / run


def has_partials(context: Context) -> bool:
    """Whether a stage that starts will find shards of an earlier attempt."""
    return any(context.work.glob("*-of-*"))


def record_stage(context: Context, whole: bool) -> None:
    """Keep what this process took; the stage is published, and the process ends soon."""
    published = [file for file in context.published.rglob("*") if file.is_file()]
    found = Measured(
        time.time() - psutil.Process().create_time(),
        _peak_host(),
        _peak_device(),
        sum(file.stat().st_size for file in published),
        whole,
    )
    folder = plan_folder(context.root, context.run)
    store.write_json(folder / f"{context.stage}.json", asdict(found))


def measured_stages(root: Path, run: str, fit: str) -> dict[str, Measured]:
    """What is known of a run's stages, those of its fit included."""
    found = {}
    for stage in STAGES:
        owner = fit if stage in FIT_STAGES else run
        file = plan_folder(root, owner) / f"{stage}.json"
        if file.is_file():
            found[stage] = Measured(**store.read_json(file))
    return found


def _peak_host() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _peak_device() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
