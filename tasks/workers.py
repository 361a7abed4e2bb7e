"""What the workers of a stage are told before its shards: whose code, which server, which means.

A worker of a given cluster may be on another machine and outlives many stages; one of our own is a
child of the stage's process. None of this is needed for threads.
"""

import functools
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psutil

from tasks.params import Runtime
from tasks.runners import CODE, cores_of_shard, told_environment

PACKAGES = ("flows", "influence", "tasks")
PLUGIN = "influence"
WORKERS_WAIT = 60.0  # seconds for a worker to join a scheduler
GUARD = 'while kill -0 "$0" 2>/dev/null; do sleep 1; done; kill -9 "$@" 2>/dev/null'


@contextmanager
def ready_workers(runtime: Runtime) -> Iterator[None]:
    """While a flow's tasks are submitted: workers find code and server, and get what they ask for.

    Threads need nothing. A stage's code is imported anew by its workers, as by the stage itself: a
    worker of a given cluster lives longer than one stage and may have seen another version.
    """
    if runtime.runner == "threads":
        yield
        return
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with get_client(sync_client=True) as client:
        server = str(client.api_url)
    placed = _on_ray if runtime.runner == "ray" else _on_dask
    # Without the address each worker would start a Prefect server of its own.
    with temporary_settings({PREFECT_API_URL: server}), placed(runtime, server):
        yield


def _on_ray(runtime: Runtime, server: str) -> AbstractContextManager[Any]:
    """Workers that know the server; as many at once on a machine as its cores and GPUs bear."""
    import ray  # pyright: ignore[reportMissingImports]
    from prefect_ray.context import remote_options  # pyright: ignore[reportMissingImports]

    if runtime.address is None:
        _end_agents_with_this_process()
    wanted = {"CPU": cores_of_shard(runtime), "GPU": runtime.gpus_per_task}
    check_means(wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    return remote_options(
        num_cpus=wanted["CPU"],
        num_gpus=wanted["GPU"],
        runtime_env={"env_vars": {"PREFECT_API_URL": server}},
    )


def check_means(wanted: dict[str, float], machines: Sequence[dict[str, float]]) -> None:
    """That some machine can take a shard: Ray would wait for one for ever, and say nothing.

    Raises:
        ValueError: with what a shard asks for and what there is.
    """
    if not any(all(m.get(name, 0) >= n for name, n in wanted.items()) for m in machines):
        there = "; ".join(_told(machine, wanted) for machine in machines) or "no machine"
        raise ValueError(
            f"a shard asks for {_told(wanted, wanted)}, which no machine of the cluster has "
            f"({there}); raise runtime.workers for fewer CPUs, lower runtime.gpus_per_task"
        )


def _told(means: dict[str, float], names: Iterable[str]) -> str:
    return " and ".join(f"{means.get(name, 0):g} {name}s" for name in names)


@functools.cache
def _end_agents_with_this_process() -> None:
    """Have a shell end our Ray's agents if this process is killed, once.

    The rest of Ray ends by itself then; its agents first try for a minute to tell somebody.
    """
    below = psutil.Process().children(recursive=True)
    agents = [str(child.pid) for child in below if child.name().startswith("ray::")]
    subprocess.Popen(
        ["sh", "-c", GUARD, str(os.getpid()), *agents],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def _on_dask(runtime: Runtime, server: str) -> Iterator[None]:
    """Workers of a given cluster, also those that join it later, take code and environment."""
    if runtime.address is None:  # ours: started by this process, with its path and environment
        yield
        return
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    assert context is not None, "shards are submitted inside a flow"
    client = context.task_runner.client  # pyright: ignore[reportAttributeAccessIssue]
    try:
        client.wait_for_workers(1, timeout=WORKERS_WAIT)
    except TimeoutError as error:
        raise ValueError(
            f"no worker has joined {runtime.address} within {WORKERS_WAIT:g} s; start some "
            f"(`dask worker {runtime.address}`, docs/scale-out.md)"
        ) from error
    lacking = [
        worker for worker, there in client.run(os.path.isdir, str(CODE)).items() if not there
    ]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} at {runtime.address}: there is no {CODE} there; all machines "
            "must have the checkout in the same place (docs/scale-out.md)"
        )
    renew = _renewal({**told_environment(), "PREFECT_API_URL": server})
    client.run_on_scheduler(renew)  # it opens what passes through it
    client.register_plugin(_worker_plugin(renew), name=PLUGIN)
    try:
        yield
    finally:
        client.unregister_worker_plugin(PLUGIN)


def failures_of_workers(runtime: Runtime) -> tuple[type[Exception], ...]:
    """What is raised for a shard whose workers died or could not begin it."""
    if runtime.runner == "dask":
        from distributed import KilledWorker  # pyright: ignore[reportMissingImports]

        return (KilledWorker,)
    if runtime.runner == "ray":
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

        return (RayError,)
    return ()


def _renewal(environment: dict[str, str]) -> Callable[[], None]:
    """What a process of a given cluster does before a stage; local, so that it travels by value."""
    code, packages = str(CODE), PACKAGES

    def renew() -> None:
        """Import the project from this checkout, as it is now."""
        import importlib
        import os
        import sys

        os.environ.update(environment)
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]
        sys.path[:] = [code, *(path for path in sys.path if path != code)]
        importlib.invalidate_caches()

    return renew


def _worker_plugin(renew: Callable[[], None]) -> Any:
    from distributed import WorkerPlugin  # pyright: ignore[reportMissingImports]

    class ThisCheckout(WorkerPlugin):
        """Each worker takes this checkout's code, also one that joins later."""

        def setup(self, worker: Any) -> None:
            renew()

    return ThisCheckout()
