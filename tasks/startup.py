"""`python -m tasks.startup [FOLDER]`: what a stage's process costs before it works, as JSON.

A process of its own, because only a fresh one imports everything anew.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import psutil

TOOLS = ("torch", "pyarrow.parquet", "dvc.repo", "prefect.flow_engine", "prefect.task_runners")
CHECKS = ("mlflow", "matplotlib.pyplot", "bm25s")  # of stage validate, beside those


def main(arguments: list[str]) -> None:
    """Import what stages import; print seconds since the process began, and its memory."""
    begun = psutil.Process().create_time()
    for name in TOOLS:
        importlib.import_module(name)
    from tasks import models

    for folder in arguments:  # the class of the model comes with it
        models.without_weights(Path(folder), 1)
    seconds, resident = time.time() - begun, psutil.Process().memory_info().rss
    for name in CHECKS:
        importlib.import_module(name)
    told = {
        "seconds": seconds,
        "bytes": resident,
        "checks_seconds": time.time() - begun - seconds,
        "checks_bytes": psutil.Process().memory_info().rss - resident,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
