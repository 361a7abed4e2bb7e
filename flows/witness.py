"""`python -m flows.witness`: a small process that sees another one end, and says so to Prefect.

A process that is killed cannot say so itself, and Prefect would show its run as running for ever.
The witness holds the reading end of a pipe whose writing end only the watched process has; the
kernel closes it however that process ends. What is then still open is set to `Crashed`.

Only the standard library is imported here: the witness costs 10 MB, not 200.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
CANCELLING = "CANCELLING"  # its worker will say how that ended
MESSAGE = "the process ended and did not say how"
TIMEOUT = 10.0
LATER = (1.0, 2.0, 4.0)  # the server learns of task runs from a queue: some after the end
BUSY, DELAYS = 503, (0.5, 1.0, 2.0, 4.0, 8.0)  # what a server says whose SQLite is busy


def watch(api_url: str, flow_run: str, server_pid: int | None = None) -> None:
    """Have a witness for this process.

    Args:
        api_url: of the Prefect server.
        flow_run: id of the flow run that this process works on.
        server_pid: a server that this process started and that must end with it.
    """
    command = [sys.executable, "-m", "flows.witness", api_url, flow_run]
    process = subprocess.Popen(
        [*command, *([str(server_pid)] if server_pid else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends the watched process's group spares the witness
    )
    _PIPES.append(process)  # open for as long as this process lives


_PIPES: list[subprocess.Popen[bytes]] = []


def main(arguments: list[str]) -> None:
    """Wait for the end of the other process, then close what it left open."""
    api_url, flow_run, *server = arguments
    sys.stdin.buffer.read()
    with contextlib.suppress(OSError, ValueError):  # no server any more, nothing to tell
        close_open_runs(api_url.rstrip("/"), flow_run, LATER[:1] if server else LATER)
    for pid in server:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


def close_open_runs(api_url: str, flow_run: str, later: tuple[float, ...] = ()) -> None:
    """Set a flow run and its task runs to `Crashed` where they are not final.

    Args:
        api_url: of the Prefect server.
        flow_run: its id.
        later: seconds between further looks at the task runs, for those that were not yet known.
    """
    state = (_call(f"{api_url}/flow_runs/{flow_run}").get("state") or {}).get("type")
    if state in FINAL:
        return
    _close_open_tasks(api_url, flow_run)
    if state != CANCELLING:
        _crash(f"{api_url}/flow_runs/{flow_run}")
    for delay in later:
        time.sleep(delay)
        _close_open_tasks(api_url, flow_run)


def _close_open_tasks(api_url: str, flow_run: str) -> None:
    asked = {"flow_runs": {"id": {"any_": [flow_run]}}}
    for task in _call(f"{api_url}/task_runs/filter", asked):
        if task["state_type"] not in FINAL:
            _crash(f"{api_url}/task_runs/{task['id']}")


def _crash(run: str) -> None:
    state = {"type": "CRASHED", "name": "Crashed", "message": MESSAGE}
    _call(f"{run}/set_state", {"state": state, "force": True})


def _call(url: str, body: Any = None) -> Any:
    """What the API answers, to GET or, with a body, to POST."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    for delay in (*DELAYS, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != BUSY or delay is None:
                raise
            time.sleep(delay)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
