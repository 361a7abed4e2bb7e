"""The witness: it says what a killed process could not, and nothing where all was said."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkout import wait_for

WATCHED = """
import sys, time
from flows.witness import watch
watch(sys.argv[1], "f", *map(int, sys.argv[2:]))
print("watched", flush=True)
time.sleep(60 if sys.stdin.readline() == "" else 0)
"""


class Server(ThreadingHTTPServer):
    """As much of Prefect's API as a witness speaks to; busy for the first request."""

    def __init__(self, state: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.flow_run = state
        self.tasks = {"done": "COMPLETED", "open": "RUNNING"}
        self.told: list[tuple[str, Any]] = []
        self.late: str | None = None  # a task run that it learns of once the flow run is closed
        self.busy = 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.say({"state": {"type": self.server.flow_run}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/task_runs/filter"):
            assert body == {"flow_runs": {"id": {"any_": ["f"]}}}
            states = self.server.tasks.items()
            self.say([{"id": name, "state_type": state} for name, state in states])
        else:
            self.server.told.append((self.path, body))
            *_, kind, name, _ = self.path.split("/")
            if kind == "task_runs":
                self.server.tasks[name] = body["state"]["type"]
            elif self.server.late:
                self.server.tasks[self.server.late] = "RUNNING"
            self.say({})

    def say(self, value: Any) -> None:
        self.server.busy -= 1
        self.send_response(503 if self.server.busy >= 0 else 200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output stays clean."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(getattr(request, "param", "RUNNING")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def watched(root: Path, *arguments: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process with a witness, and the witness."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    (witness,) = psutil.Process(process.pid).children()
    return process, witness


def test_what_a_killed_process_left_open_is_crashed(root, server):
    process, witness = watched(root, server.url)
    os.killpg(os.getpgid(witness.pid), 0)  # a group of its own: what ends the other's spares it
    assert os.getpgid(witness.pid) != os.getpgid(process.pid)
    server.late = "late"
    process.kill()
    process.wait()
    closed = [
        "/api/task_runs/open/set_state",
        "/api/flow_runs/f/set_state",
        "/api/task_runs/late/set_state",
    ]
    wait_for(lambda: [path for path, _ in server.told] == closed, 10, f"{closed}")
    witness.kill()
    assert {(body["state"]["type"], body["force"]) for _, body in server.told} == {
        ("CRASHED", True)
    }


@pytest.mark.parametrize("server", ["COMPLETED", "FAILED"], indirect=True)
def test_of_a_run_that_ended_nothing_is_said(root, server):
    process, witness = watched(root, server.url)
    process.communicate("end\n")
    witness.wait(timeout=10)
    assert server.told == []


@pytest.mark.parametrize("server", ["CANCELLING"], indirect=True)
def test_a_run_that_is_being_cancelled_is_left_to_its_worker(root, server):
    process, witness = watched(root, server.url)
    process.send_signal(signal.SIGTERM)
    process.wait()
    witness.wait(timeout=30)
    assert [path for path, _ in server.told] == ["/api/task_runs/open/set_state"]


def test_without_a_server_it_ends_and_ends_the_one_that_was_lent(root):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as lent:
        process, witness = watched(root, "http://127.0.0.1:9/api", str(lent.pid))
        process.kill()
        process.wait()
        witness.wait(timeout=10)
        wait_for(lambda: lent.poll() is not None, 5, "the end of the server")


def test_it_is_light(root, server):
    process, witness = watched(root, server.url)
    modules = {Path(each.path).name for each in witness.memory_maps()}
    assert witness.memory_info().rss < 40e6
    assert not any("torch" in name or "pydantic" in name for name in modules)
    process.communicate("end\n")
