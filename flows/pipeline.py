"""`python -m flows.pipeline RUN [--until STAGE]`: a run from its params to its report.

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
from flows.lock import check_idle
from flows.processes import INTERRUPTED
from tasks.active import check_active, check_inputs
from tasks.params import load_params
from tasks.progress import duration, say
from tasks.workspace import ARTIFACTS, FIT_STAGES, STAGES, find_root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipeline; the exit status: 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument("run", help="name of a run: params/RUN.yaml")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
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


def run_pipeline(root: Path, run: str, until: str) -> int:
    """Check the input, bring the stages up to date, say where the result is."""
    start = time.monotonic()
    check_idle(root)  # before the seconds that Prefect takes to come
    params = load_params(root, run)
    fit = check_active(root, run, params)
    check_inputs(root, run, params)
    environment.set_environment(root)
    environment.check_server()
    from flows.doors import pipeline  # after the environment: Prefect reads it when imported

    state: Any = pipeline(run, cast(Any, until), return_state=True)
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
