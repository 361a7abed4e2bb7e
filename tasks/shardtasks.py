"""The Prefect tasks of a map of shards: submitted, cached, awaited, and checked against files."""

import errno
import pickle
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import workers
from tasks.progress import Progress, say

if TYPE_CHECKING:  # it imports this module
    from tasks.shards import Job

RETRY_DELAYS = [1.0, 5.0]
TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.EBUSY}
ARRIVAL = 60.0  # seconds; a network file system may hide a new file for about as long


def inside_flow() -> bool:
    """Whether there is a flow run for the shards to be tasks of."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def tell_flow(line: str) -> None:
    """To the terminal and to the flow run's log."""
    from prefect import get_run_logger

    say(line)
    get_run_logger().info(line)


def run_tasks(jobs: "Sequence[Job]", progress: Progress) -> None:
    """Submit all, tell of each as it ends, and check what is remembered against its file."""
    from prefect.futures import as_completed as as_tasks_complete

    tasks = {_submit(job, refresh=not job.path.is_file()): i for i, job in enumerate(jobs)}
    for future in as_tasks_complete(list(tasks)):
        job = jobs[tasks[future]]
        result = _result(job, future)
        cached = future.state.name == "Cached"
        if cached and not job.holds(result):
            cached = False
            _result(job, _submit(job, refresh=True))
        _await_file(job.path)
        progress.shard_done(tasks[future], cached)


def _result(job: "Job", future: Any) -> dict[str, str]:
    """What a task returned.

    Raises:
        ValueError: from the task, or if its workers did not live to run it.
    """
    runtime = job.context.params.runtime
    try:
        return future.result()
    except workers.failures_of_workers(runtime) as error:
        raise ValueError(
            f"the {runtime.runner} workers of {job.file} failed ({str(error).splitlines()[0]}); "
            "if they died, they may lack memory: lower runtime.tokens_per_batch or runtime.workers"
        ) from error


def _await_file(path: Path) -> None:
    """Until a file that a worker has written is seen here too.

    Raises:
        ValueError: if it never is.
    """
    deadline = time.monotonic() + ARRIVAL
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"a worker wrote {path}, which is not there on this machine: its folder must be "
                "one that all machines share (docs/scale-out.md)"
            )
        time.sleep(0.1)


class _Sealed:
    """A job that travels unopened.

    Prefect does not look into it for futures, as it would into a dataclass (its own `opaque` does
    not survive the way to another process); and Dask's scheduler, which opens what passes through
    it, need not import what computes the job.
    """

    def __init__(self, job: "Job") -> None:
        self._job, self._pickled = job, b""

    def __getstate__(self) -> bytes:
        return self._pickled or pickle.dumps(self._job)

    def __setstate__(self, pickled: bytes) -> None:
        self._pickled = pickled

    @property
    def job(self) -> "Job":
        return pickle.loads(self._pickled) if self._pickled else self._job


def _submit(job: "Job", *, refresh: bool) -> Any:
    """The future of a Prefect task that computes one shard, or finds it computed."""
    from prefect import task

    shard_task = task(
        name=f"{job.context.stage} {job.name}",
        task_run_name=f"{job.name} {job.shard.index + 1} of {job.shard.total}",
        cache_key_fn=lambda _context, inputs: inputs["sealed"].job.cache_key,
        persist_result=True,
        result_serializer="json",
        refresh_cache=refresh,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=_may_retry,
    )(_run_job)
    return shard_task.submit(_Sealed(job))


def _run_job(sealed: _Sealed) -> Any:
    """`job.run()`; the caller's own errors end the task without a traceback in the log.

    On its way out of another process an error loses what its class adds and, where no `distributed`
    has seen to that, its traceback.
    """
    from prefect.states import Failed

    try:
        return sealed.job.run()
    except ValueError as error:
        return Failed(message=str(error), data=ValueError(str(error)))
    except Exception as error:
        if sealed.job.context.params.runtime.runner == "ray" and "tblib" not in sys.modules:
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
        raise


def _may_retry(_task: Any, _run: Any, state: Any) -> bool:
    return is_transient(state.data)


def is_transient(error: Any) -> bool:
    """Whether trying again may help: a network file system's hiccup, not a full disk."""
    return isinstance(error, OSError) and error.errno in TRANSIENT
