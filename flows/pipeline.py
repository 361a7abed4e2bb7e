"""`python -m flows.pipeline NAME [--until STAGE]`: a run, or a benchmark, from params to result.

Stages that are up to date are not run again; a killed stage resumes at its missing shards.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from flows import environment
from flows.checks import check, last_stage
from flows.lock import check_idle
from flows.processes import INTERRUPTED
from tasks.progress import duration, say
from tasks.validation.settings import is_benchmark
from tasks.workspace import ARTIFACTS, FIT_STAGES, STAGES, find_root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipeline; the exit status: 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument("run", metavar="NAME", help="of a run or a benchmark")
    parser.add_argument("--until", choices=STAGES, help="the last stage of a run; else report")
    given = parser.parse_args(arguments)
    try:
        root = find_root(Path.cwd())
        os.chdir(root)
        return run_pipeline(root, given.run, given.until)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"pipeline: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("pipeline: stopped; run the same command to go on\n")
        return INTERRUPTED


def run_pipeline(root: Path, run: str, asked: str | None) -> int:
    """Check the input, bring the stages up to date, say where the result is."""
    start = time.monotonic()
    check_idle(root)  # before the seconds that Prefect takes to come
    fit, until = check(root, run), last_stage(root, run, asked)
    environment.set_environment(root)
    environment.check_server()
    from flows import doors  # after the environment: Prefect reads it when imported

    state: Any = (
        doors.benchmark(run, return_state=True)
        if is_benchmark(root, run)
        else doors.pipeline(run, cast(Any, until), return_state=True)
    )
    if not state.is_completed():
        sys.stderr.write(f"pipeline: stopped: {state.message}\n")
        sys.stderr.write("pipeline: what is finished is kept; run the same command to go on\n")
        return 1
    say(f"{run}: {until} is up to date after {duration(time.monotonic() - start)}")
    folder = root / ARTIFACTS / (fit if until in FIT_STAGES else run) / until
    say(f"{folder / 'index.html' if until == 'report' else folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
