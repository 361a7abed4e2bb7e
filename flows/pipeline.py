"""`python -m flows.pipeline RUN [--until STAGE]`: a run from its params to its report.

Stages that are up to date are not run again; a killed stage resumes at its missing shards.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flows import environment
from flows.processes import INTERRUPTED
from tasks.active import check_active, check_inputs
from tasks.params import load_params
from tasks.progress import duration, say
from tasks.workspace import ARTIFACTS, STAGES, WORK, find_root

LOCK, OWNER = WORK / "workspace.lock", WORK / "workspace.pid"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipeline; the exit status: 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument("run", help="name of a run: params/RUN.yaml")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    given = parser.parse_args(arguments)
    try:
        root = find_root(Path.cwd())
        os.chdir(root)
        with workspace_lock(root):
            return run_pipeline(root, given.run, given.until)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"pipeline: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("pipeline: stopped; run the same command to go on\n")
        return INTERRUPTED


def run_pipeline(root: Path, run: str, until: str) -> int:
    """Check the input, bring the stages up to date, say where the result is."""
    start = time.monotonic()
    params = load_params(root, run)
    check_active(root, run, params)
    check_inputs(root, run, params)
    environment.set_environment(root)
    environment.check_server()
    from flows.dvcflow import pipeline  # after the environment: Prefect reads it when imported

    state = pipeline(run, until, return_state=True)
    if not state.is_completed():
        sys.stderr.write(f"pipeline: stopped: {state.message}\n")
        sys.stderr.write("pipeline: what is finished is kept; run the same command to go on\n")
        return 1
    say(f"{run}: {until} is up to date after {duration(time.monotonic() - start)}")
    folder = root / ARTIFACTS / run / until
    say(f"{folder / 'index.html' if until == 'report' else folder}")
    return 0


@contextmanager
def workspace_lock(root: Path) -> Iterator[None]:
    """One pipeline at a time in a checkout; the kernel frees the lock of a killed one.

    Raises:
        ValueError: if another pipeline is at work here, with its process id.
    """
    (root / WORK).mkdir(exist_ok=True)
    try:
        with FileLock(root / LOCK, timeout=0):
            (root / OWNER).write_text(f"{os.getpid()}\n")
            yield
    except Timeout as error:
        owner = (root / OWNER).read_text().strip() if (root / OWNER).is_file() else "unknown"
        raise ValueError(
            f"another pipeline (process {owner}) is at work in {root}; wait for it to end"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
