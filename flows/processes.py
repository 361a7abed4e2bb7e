"""Processes that do not outlive their parents."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

import psutil

from flows import witness

GRACE = 5.0  # seconds between the request to end and the kill
PR_SET_PDEATHSIG = 1
STDERR = 2
INTERRUPTED, TERMINATED = 130, 143  # exit statuses, as shells have them


def end_with_parent() -> None:
    """End this process when its parent dies: asked at once (Linux), killed after `GRACE`.

    Killing it is safe: files of shards are there whole or not at all.
    """
    parent = os.getppid()
    signal_at_parents_death()
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def signal_at_parents_death() -> None:
    """Have the kernel send SIGTERM when the parent dies; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def end_when_interrupted(label: str) -> None:
    """At Ctrl-C, say so and end within `GRACE`, even if threads are in the middle of a shard."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _exit_soon(label, INTERRUPTED)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def end_when_terminated(label: str) -> None:
    """Within a flow run: the same at SIGTERM, to which Prefect's own handler answers first."""
    if threading.current_thread() is not threading.main_thread():
        return  # only that one may; another process's signals are not for this flow
    answer = signal.getsignal(signal.SIGTERM)

    def terminate(number: int, frame: FrameType | None) -> None:
        _exit_soon(label, TERMINATED)
        if not callable(answer):
            raise SystemExit(TERMINATED)
        answer(number, frame)

    signal.signal(signal.SIGTERM, terminate)


def _exit_soon(label: str, status: int) -> None:
    # Not by sys.stderr, which may be in the middle of a line of its own.
    os.write(STDERR, f"{label}: stopped; finished shards are kept\n".encode())
    timer = threading.Timer(GRACE, os._exit, (status,))
    timer.daemon = True
    timer.start()


def have_witness() -> None:
    """Within a flow run: have a process that closes the run should this one be killed.

    It also ends the server that this process started, if it did: Prefect ends one only when the
    process that started it ends in an orderly way.
    """
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    with get_client(sync_client=True) as client:
        server = str(client.api_url)
    started = [each.pid for each in psutil.Process().children() if "uvicorn" in each.cmdline()]
    witness.watch(server, str(flow_run.id), *started[:1])


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process and all of its group: SIGTERM, then SIGKILL after `GRACE`."""
    _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and _group_lives(process):
        process.poll()
        time.sleep(0.1)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _group_lives(process: subprocess.Popen[str]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
