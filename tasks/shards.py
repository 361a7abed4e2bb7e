"""Map one stage's work over shards: cached Prefect tasks whose results are files in `.work/`.

A shard is the unit of retry, of resume and of distribution. A task is given plain references and
returns a file's name and digest; no tensor crosses its boundary. Prefect remembers the digest
under a key of all that the shard depends on, and a remembered shard counts only while its file
has that digest: what a killed stage had finished is not computed again, and nothing stale or
half-written is ever taken.
"""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import store
from tasks.params import MAX_SHARDS, Runtime
from tasks.progress import Progress, say
from tasks.workspace import StageContext

RETRY_DELAYS = [1.0, 5.0]
TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.EBUSY}


@dataclass(frozen=True, slots=True)
class ShardRef:
    """Which part of the work: `items` are positions in an order that the stage defines."""

    index: int
    total: int
    items: Sequence[int]

    @property
    def num_items(self) -> int:
        """How much work, in items."""
        return len(self.items)


Compute = Callable[..., None]


def split(num_items: int, num_shards: int) -> list[ShardRef]:
    """`range(num_items)` in at most `num_shards` contiguous parts, none empty, sizes within one."""
    total = min(num_items, num_shards)
    if total < 1:
        raise ValueError(f"{num_items} items in {num_shards} shards: there is nothing to work on")
    bounds = [num_items * index // total for index in range(total + 1)]
    return [ShardRef(i, total, range(bounds[i], bounds[i + 1])) for i in range(total)]


def shards_of(groups: Iterable[Sequence[int]]) -> list[ShardRef]:
    """One shard for each group of items."""
    parts = [tuple(group) for group in groups]
    return [ShardRef(index, len(parts), part) for index, part in enumerate(parts)]


def map_shards(
    context: StageContext,
    compute: Compute,
    shards: Sequence[ShardRef],
    *,
    name: str = "shard",
    suffix: str = ".safetensors",
    **values: Any,
) -> list[Path]:
    """The files of all shards, in order; computed where they are not there yet.

    Inside a stage's flow the shards are Prefect tasks on the run's runner. Outside of any flow
    (a test, a debugger) they are computed anew by as many threads, with no server and no cache.

    Args:
        context: of the stage.
        compute: `compute(context, shard, path, **values)`, importable; writes `path` by `store`.
        shards: at most 50 (more task runs stall Prefect's sqlite database).
        name: what the files are called; another for each map of a stage.
        suffix: of the files.
        values: plain JSON values handed to `compute`; part of the cache key.

    Raises:
        ValueError: for more than 50 shards, or from `compute`.
    """
    if len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{len(shards)} shards named {name!r}: Prefect's database stalls above {MAX_SHARDS} "
            "task runs a stage; put more items into each (`split`)"
        )
    jobs = [Job(context, compute, shard, name, suffix, values) for shard in shards]
    sizes = [shard.num_items for shard in shards]
    if _inside_flow():
        _run_tasks(jobs, Progress(f"{context.stage} {name}", sizes, _tell_flow))
    else:
        _run_threads(jobs, Progress(f"{context.stage} {name}", sizes))
    return [job.path for job in jobs]


@dataclass(frozen=True, slots=True)
class Job:
    """One shard with what to do about it: all that a worker needs."""

    context: StageContext
    compute: Compute
    shard: ShardRef
    name: str
    suffix: str
    values: dict[str, Any]

    @property
    def file(self) -> str:
        """Name of the shard's file."""
        return f"{self.name}-{self.shard.index:05d}-of-{self.shard.total:05d}{self.suffix}"

    @property
    def path(self) -> Path:
        """Where the shard's file is."""
        return self.context.work / self.file

    @property
    def cache_key(self) -> str:
        """sha256 of all that the shard's file depends on."""
        told = json.dumps(self.values, sort_keys=True, allow_nan=False)
        where = f"{self.compute.__module__}.{self.compute.__qualname__}"
        parts = (self.context.fingerprint, self.context.stage, where, self.file, told)
        items = hashlib.sha256(repr(tuple(self.shard.items)).encode()).hexdigest()
        return hashlib.sha256("\n".join((*parts, items)).encode()).hexdigest()

    def run(self) -> dict[str, str]:
        """Compute the file; its name and digest."""
        limit_torch_threads(self.context.params.runtime.workers)
        self.compute(self.context, self.shard, self.path, **self.values)
        assert self.path.is_file(), f"{self.compute.__qualname__} did not write {self.path}"
        return {"file": self.file, "digest": store.digest(self.path)}

    def holds(self, result: Any) -> bool:
        """Whether the file is there, as `result` (an error, if it failed) says it was written."""
        if not (isinstance(result, dict) and self.path.is_file()):
            return False
        return store.digest(self.path) == result["digest"]


def limit_torch_threads(workers: int) -> None:
    """This thread's share of the cores, so that `workers` threads do not fight over them.

    The number also fixes the order in which torch adds up: equal runs give equal bits.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(max(1, num_cores() // workers))


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def is_transient(error: Any) -> bool:
    """Whether trying again may help: a network file system's hiccup, not a full disk."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def task_runner(runtime: Runtime) -> Any:
    """The Prefect task runner of `runtime.runner`; results are the same with each.

    Raises:
        ValueError: for a runner that is not built in yet.
    """
    from prefect.task_runners import ThreadPoolTaskRunner

    if runtime.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=runtime.workers)
    raise ValueError(
        f"`runtime.runner`: given {runtime.runner!r}, which is not supported yet; set it to threads"
    )


def _inside_flow() -> bool:
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _tell_flow(line: str) -> None:
    """To the terminal and to the flow run's log."""
    from prefect import get_run_logger

    say(line)
    get_run_logger().info(line)


def _run_threads(jobs: Sequence[Job], progress: Progress) -> None:
    with ThreadPoolExecutor(jobs[0].context.params.runtime.workers) as pool:
        indices = {pool.submit(job.run): index for index, job in enumerate(jobs)}
        for future in as_completed(indices):
            future.result()
            progress.shard_done(indices[future], cached=False)


def _run_tasks(jobs: Sequence[Job], progress: Progress) -> None:
    """Submit all, tell of each as it ends, and check what is remembered against its file."""
    from prefect.futures import as_completed as as_tasks_complete

    tasks = {_submit(job, refresh=not job.path.is_file()): i for i, job in enumerate(jobs)}
    for future in as_tasks_complete(list(tasks)):
        index, result = tasks[future], future.result()
        cached = future.state.name == "Cached"
        if cached and not jobs[index].holds(result):
            cached = False
            _submit(jobs[index], refresh=True).result()
        progress.shard_done(index, cached)


def _submit(job: Job, *, refresh: bool) -> Any:
    """The future of a Prefect task that computes one shard, or finds it computed."""
    from prefect import task
    from prefect.utilities.annotations import opaque

    shard_task = task(
        name=f"{job.context.stage} {job.name}",
        task_run_name=f"{job.name} {job.shard.index + 1} of {job.shard.total}",
        cache_key_fn=lambda _context, inputs: inputs["job"].cache_key,
        persist_result=True,
        result_serializer="json",
        refresh_cache=refresh,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=_may_retry,
    )(_run_job)
    told: Any = opaque(job)  # not searched for futures; arrives as the job itself
    return shard_task.submit(told)


def _run_job(job: Job) -> Any:
    """`job.run()`; the caller's own errors end the task without a traceback in the log."""
    from prefect.states import Failed

    try:
        return job.run()
    except ValueError as error:
        return Failed(message=str(error), data=error)


def _may_retry(_task: Any, _run: Any, state: Any) -> bool:
    return is_transient(state.data)
