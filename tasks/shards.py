"""Map one stage's work over shards: cached Prefect tasks whose results are files in `.work/`.

A shard is the unit of retry, of resume and of distribution. A task is given plain references and
returns a file's name and digest; no tensor crosses its boundary. Prefect remembers the digest
under a key of all that the shard depends on, and a remembered shard counts only while its file
has that digest: what a killed stage had finished is not computed again, and nothing stale or
half-written is ever taken.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tasks import runners, shardtasks, store, workers
from tasks.params import MAX_SHARDS
from tasks.progress import Progress, say
from tasks.progressbar import kept_bar
from tasks.runners import task_runner as task_runner
from tasks.workspace import Context


def _unheard(_num_items: int) -> None:
    """A tick that nobody counts."""


@dataclass(frozen=True, slots=True)
class ShardRef:
    """Which part of the work: `items` are positions in an order that the stage defines.

    `tick` is told how many more of them are done; where they are counted in another process, or
    not at all, nobody hears it.
    """

    index: int
    total: int
    items: Sequence[int]
    tick: Callable[[int], None] = field(default=_unheard, compare=False, repr=False)

    @property
    def num_items(self) -> int:
        """How much work, in items."""
        return len(self.items)

    def counted(self) -> Iterator[int]:
        """The items, each of which counts as done when the next is asked for."""
        for item in self.items:
            yield item
            self.tick(1)


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
    context: Context,
    compute: Compute,
    shards: Sequence[ShardRef],
    *,
    name: str = "shard",
    suffix: str = ".safetensors",
    items: str = "sequences",
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
        items: what is counted, in the plural.
        values: plain JSON values handed to `compute`; part of the cache key.

    Raises:
        ValueError: for more than 50 shards, or from `compute`.
    """
    if len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{len(shards)} shards named {name!r}: Prefect's database stalls above {MAX_SHARDS} "
            "task runs a stage; put more items into each (`split`)"
        )
    runtime, in_flow = context.params.runtime, shardtasks.inside_flow()
    sizes = [shard.num_items for shard in shards]
    tell = shardtasks.tell_flow if in_flow else say
    progress = Progress(f"{context.stage} {name}", sizes, tell, items=items)
    if runtime.runner == "threads" or not in_flow:
        shards = [dataclasses.replace(s, tick=partial(progress.tick, s.index)) for s in shards]
    cores, software = runners.cores_of_shard(runtime), runners.software()
    of_all = (name, suffix, values, cores, software)
    jobs = [Job(context, compute, shard, *of_all) for shard in shards]
    if in_flow:
        with workers.ready_workers(runtime), kept_bar(progress, bar_key(context)):
            shardtasks.run_tasks(jobs, progress)
    else:
        _run_threads(jobs, progress)
    return [job.path for job in jobs]


@contextmanager
def watched(context: Context, items: str, num_items: int) -> Iterator[Callable[..., None]]:
    """Progress of work that is not in shards: yields a `tick(num_items, cached=False)`, to be told
    how many more items are done; `cached`: they were before, and do not count for the speed."""
    in_flow = shardtasks.inside_flow()
    tell = shardtasks.tell_flow if in_flow else say
    progress = Progress(f"{context.stage} {items}", [num_items], tell, items=items)
    with kept_bar(progress, bar_key(context)) if in_flow else nullcontext():
        yield partial(progress.tick, 0)
        progress.shard_done(0, cached=False)


def bar_key(context: Context) -> str:
    """Under which key Prefect's UI keeps the bars of a stage."""
    return f"{context.run}-{context.stage}".replace("_", "-")


@dataclass(frozen=True, slots=True)
class Job:
    """One shard with what to do about it: all that a worker needs.

    `cores` and `software` are those of the stage's own process: a worker that computed on another
    number of cores, or with another torch, would round otherwise.
    """

    context: Context
    compute: Compute
    shard: ShardRef
    name: str
    suffix: str
    values: dict[str, Any]
    cores: int
    software: str

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
        """Compute the file; its name and digest.

        Raises:
            ValueError: if this process runs other software than the stage, or from `compute`.
        """
        if runners.software() != self.software:
            raise ValueError(
                f"a worker runs {runners.software()}, but the stage {self.software}; give all "
                "machines the same checkout in the same place, and the same packages "
                "(docs/scale-out.md)"
            )
        limit_torch_threads(self.cores)
        self.compute(self.context, self.shard, self.path, **self.values)
        assert self.path.is_file(), f"{self.compute.__qualname__} did not write {self.path}"
        return {"file": self.file, "digest": store.digest(self.path)}

    def holds(self, result: Any) -> bool:
        """Whether the file is there, as `result` (an error, if it failed) says it was written."""
        if not (isinstance(result, dict) and self.path.is_file()):
            return False
        return store.digest(self.path) == result["digest"]


def limit_torch_threads(cores: int) -> None:
    """This thread's share of the cores, so that the workers do not fight over them.

    The number also fixes the order in which torch adds up: equal runs give equal bits.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(cores)


def _run_threads(jobs: Sequence[Job], progress: Progress) -> None:
    with ThreadPoolExecutor(jobs[0].context.params.runtime.workers) as pool:
        indices = {pool.submit(job.run): index for index, job in enumerate(jobs)}
        for future in as_completed(indices):
            future.result()
            progress.shard_done(indices[future], cached=False)
