"""One stage at a time on the accelerator, over all that share a Prefect server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from flows import environment
from tasks.params import Runtime

GPU = "gpu"
DRIVER = Path("/proc/driver/nvidia/version")


@contextmanager
def accelerator(runtime: Runtime) -> Iterator[None]:
    """Wait for the accelerator if this stage may use one and shares its server with others."""
    alone = environment.API_URL not in os.environ or environment.LENT_SERVER in os.environ
    if alone or runtime.device == "cpu" or (runtime.device == "auto" and not DRIVER.exists()):
        yield
        return
    with get_client(sync_client=True) as client:
        make_limit(client)
    with concurrency(GPU, occupy=1, strict=True):
        yield


def make_limit(client: SyncPrefectClient) -> None:
    """The global concurrency limit `gpu`, one slot, unless somebody has made it already."""
    try:
        client.read_global_concurrency_limit_by_name(GPU)
    except ObjectNotFound:
        client.upsert_global_concurrency_limit_by_name(GPU, 1)
