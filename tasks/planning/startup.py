"""`python -m tasks.planning.startup MODEL`: what a stage's process costs before it works, as JSON.

MODEL is the folder of a checkpoint, and perhaps that of its adapter, or an architecture of
transformers.

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
    """Import what stages import; print the seconds that took, and the process's memory.

    Seconds of the processor: what else is at work on the machine now need not be later.
    """
    for name in TOOLS:
        importlib.import_module(name)
    from tasks import adapters, models

    bare = psutil.Process().memory_info().rss
    for model in arguments:  # its class comes with it
        if adapters.is_adapter(Path(model)):
            adapters.peft_module()
        elif (Path(model) / "config.json").is_file():
            models.without_weights(Path(model), 1)
        else:
            importlib.import_module(f"transformers.models.{model}.modeling_{model}")
            importlib.import_module("tasks.train")
    seconds, resident = time.process_time(), psutil.Process().memory_info().rss
    for name in CHECKS:
        importlib.import_module(name)
    told = {
        "seconds": seconds,
        "bare_bytes": bare,
        "bytes": resident,
        "checks_seconds": time.process_time() - seconds,
        "checks_bytes": psutil.Process().memory_info().rss - resident,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
