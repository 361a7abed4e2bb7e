"""One door at a time: who works in a checkout, works there alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.workspace import WORK

LOCK, OWNER = WORK / "workspace.lock", WORK / "workspace.pid"


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


def check_idle(root: Path) -> None:
    """That no pipeline is at work here now.

    Raises:
        ValueError: if one is.
    """
    with workspace_lock(root):
        pass
