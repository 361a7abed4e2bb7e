"""Who runs the shards: threads of this process, or processes of Dask or Ray, here or elsewhere.

Prefect's own task runners do the work. What is added is that a worker runs this checkout's code,
finds the Prefect server and the result folder, and takes as many cores as a thread would: so the
artefacts are the same, byte for byte, with each.
"""

import atexit
import contextlib
import functools
import ipaddress
import logging
import os
import platform
import secrets
import shutil
import socket
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.params import Runtime

CODE = Path(__file__).resolve().parents[1]  # the checkout whose code this process runs
HOST = "127.0.0.1"  # where a cluster of our own listens: nobody else can hand it work
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or it starts a cluster to ask it whether there is one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns that this will be the default
}
RAY_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": a Ray of one machine, on `HOST` only
CONNECT_WAIT = 5.0  # seconds; a scheduler that is up answers in a few milliseconds
OBJECT_STORE = 100 << 20  # bytes; Ray would take 30 % of the memory, for file names and digests
TOLD = (  # what a worker is told of this process's environment; no secrets, for Ray logs it
    "DO_NOT_TRACK",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_OFFLINE",
    "PREFECT_HOME",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL",
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "TOKENIZERS_PARALLELISM",
    "TQDM_DISABLE",
)


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cores_of_shard(runtime: Runtime) -> int:
    """How many cores a shard computes on: `workers` of them share this process's."""
    return max(1, num_cores() // runtime.workers)


@functools.cache
def software() -> str:
    """What this process computes with; another worker with the same gives the same bits."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "prefect")]
    return f"Python {platform.python_version()}, {', '.join(versions)} and the code in {CODE}"


def task_runner(runtime: Runtime) -> Any:
    """The Prefect task runner of `runtime.runner`; results are the same with each.

    Raises:
        ValueError: if its package is not installed, or nothing answers at `runtime.address`.
    """
    if runtime.address is not None:
        check_address(runtime.address)
    if runtime.runner == "dask":
        return _dask(runtime)
    if runtime.runner == "ray":
        return _ray(runtime)
    from prefect.task_runners import ThreadPoolTaskRunner

    return ThreadPoolTaskRunner(max_workers=runtime.workers)


def _dask(runtime: Runtime) -> Any:
    try:
        from prefect_dask.task_runners import DaskTaskRunner  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(_missing("dask")) from error
    if runtime.address is not None:
        return DaskTaskRunner(address=runtime.address)
    return DaskTaskRunner(
        cluster_kwargs={
            "n_workers": runtime.workers,
            "threads_per_worker": 1,
            "host": HOST,
            "dashboard_address": f"{HOST}:0",
            "memory_limit": 0,  # as with threads, no worker is ended for what it needs
            "silence_logs": logging.CRITICAL,
        }
    )


def _ray(runtime: Runtime) -> Any:
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)  # before Ray is imported
    try:
        from prefect_ray.task_runners import RayTaskRunner  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(_missing("ray")) from error
    common = {
        "runtime_env": {"env_vars": told_environment()},
        "log_to_driver": False,
        "logging_level": logging.CRITICAL,
    }
    if runtime.address is not None:
        return RayTaskRunner(runtime.address, common)
    os.environ[RAY_ON_LOOPBACK] = "0"
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_ray_token())
    return RayTaskRunner(
        "local",
        {
            **common,
            "num_cpus": runtime.workers * cores_of_shard(runtime),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_temp_dir": _ray_folder(),
        },
    )


@functools.cache
def _ray_token() -> str:
    """This process's word to its Ray, which would leave one of its own in the user's home."""
    return secrets.token_hex(32)


def _ray_folder() -> str:
    """A folder for Ray's sockets and logs, gone when this process ends.

    Not in the checkout: the path of a socket is 107 characters at most. Ray lets everybody write
    to its folder; the one around it is ours alone.
    """
    folder = tempfile.mkdtemp(prefix="ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"{folder}/r"


def _missing(runner: str) -> str:
    return (
        f"`runtime.runner` is {runner}, but prefect-{runner} is not installed; run "
        f"`.venv/bin/pip install -e '.[{runner}]' -c constraints.txt`, or set it to threads"
    )


def check_address(address: str) -> None:
    """That something listens at a scheduler's address, and that its workers can reach Prefect.

    Raises:
        ValueError: if not, with the address and what to do.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_WAIT):
            pass
    except OSError as error:
        raise ValueError(
            f"`runtime.address` is {address}, but nothing answers there ({error}); start the "
            "cluster first (docs/scale-out.md), or set it to null for workers on this machine"
        ) from error
    server = os.environ.get("PREFECT_API_URL")
    if _is_here(parts.hostname) or (server and not _is_here(urlsplit(server).hostname)):
        return
    raise ValueError(
        f"the workers of {address} cannot reach a Prefect server that listens on this machine "
        "only; start one with `prefect server start --host <address of this machine>` and name "
        "it in PREFECT_API_URL (docs/scale-out.md)"
    )


def _is_here(host: str | None) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return ipaddress.ip_address(socket.gethostbyname(host or "")).is_loopback
    return False


def told_environment() -> dict[str, str]:
    """The environment variables that a worker is given, beside PREFECT_API_URL."""
    told = {name: os.environ[name] for name in TOLD if name in os.environ}
    path = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**told, "PYTHONPATH": os.pathsep.join(path)}
