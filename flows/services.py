"""The servers that a person looks at: started in the background, and ended, all together."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows import environment
from flows.processes import GRACE
from tasks.progress import say
from tasks.workspace import ARTIFACTS

START = 120.0  # seconds that a server may take to answer; the first time it makes its database
POOL = "local"


@dataclass(frozen=True, slots=True)
class Service:
    """A background process of the project.

    Attributes:
        name: of its files in `.prefect/services`.
        command: what runs, by this interpreter with `-m`.
        url: where a person finds it.
        health: what answers when it is up; None: nothing can be asked.
        extra: of its environment.
    """

    name: str
    command: tuple[str, ...]
    url: str
    health: str | None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The middle of the variable that says where it is."""
        return {"server": "PREFECT", "worker": "PREFECT"}.get(self.name, self.name.upper())


def services(root: Path) -> tuple[Service, ...]:
    """All services, in the order in which they start."""
    prefect, mlflow = environment.PREFECT_URL, environment.MLFLOW_URL
    reports, artifacts = environment.REPORTS_URL, root / ARTIFACTS
    return (
        Service(
            "server",
            ("prefect", "server", "start", *_at(prefect)),
            prefect,
            f"{prefect}/api/health",
            {"PREFECT_UI_API_URL": f"{prefect}/api"},  # what the pages in the browser call
        ),
        Service(
            "worker",
            ("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "1"),
            f"{prefect}/work-pools/work-pool/{POOL}",
            None,
            # A click in the UI is answered within 2 s, not 10.
            {environment.API_URL: f"{prefect}/api", "PREFECT_WORKER_QUERY_SECONDS": "2"},
        ),
        Service(
            "mlflow",
            (
                *("mlflow", "server", *_at(mlflow), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"),
            ),
            mlflow,
            f"{mlflow}/health",
            # Without its job consumers the server needs 0.5 GB instead of 2.4 GB.
            {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        ),
        Service(
            "reports",
            ("http.server", _port(reports), "--bind", "127.0.0.1", "--directory", str(artifacts)),
            reports,
            reports,
        ),
    )


def up(root: Path, deploy: Callable[[], Sequence[str]]) -> None:
    """Start what is not running yet, and register the deployments.

    Raises:
        ValueError: if a service does not come up; its log is named.
    """
    (root / ARTIFACTS).mkdir(exist_ok=True)
    for service in services(root):
        if service.name == "worker":
            _register(service, deploy)
        started = _start(root, service)
        say(f"{service.name:<12} {service.url}  ({'started' if started else 'was up already'})")


def serve(root: Path, name: str, deploy: Callable[[], Sequence[str]]) -> None:
    """Become one service, in the foreground; what it says goes to the terminal.

    Raises:
        ValueError: if it is up already, or it is the worker and no server is.
    """
    service = next(each for each in services(root) if each.name == name)
    _check_free(root, service)
    if name == "worker":
        if not answers(f"{environment.PREFECT_URL}/api/health"):
            raise ValueError(
                f"no Prefect server at {environment.PREFECT_URL}; run `make server` in another "
                "terminal first, or `make up` for all services at once"
            )
        _register(service, deploy)
    say(f"{service.name}: {service.url}")
    _note(root, service, psutil.Process())
    command = [sys.executable, "-m", *service.command]
    os.execve(sys.executable, command, environment.child_environment(**service.extra))


def down(root: Path) -> None:
    """End all services of this checkout, the last first."""
    for service in reversed(services(root)):
        process = environment.service_process(root, service.name)
        if process is not None:
            _end(process)
            say(f"{service.name:<12} ended")
        (root / environment.SERVICES / f"{service.name}.pid").unlink(missing_ok=True)


def _register(worker: Service, deploy: Callable[[], Sequence[str]]) -> None:
    os.environ[environment.API_URL] = worker.extra[environment.API_URL]
    say(f"deployments  {', '.join(deploy())}")


def _start(root: Path, service: Service) -> bool:
    """Whether the service had to be started."""
    if environment.service_process(root, service.name) is not None:
        return False
    _check_free(root, service)
    log = root / environment.SERVICES / f"{service.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *service.command],
            cwd=root,
            env=environment.child_environment(**service.extra),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _note(root, service, psutil.Process(process.pid))
    _wait(service, process, log)
    return True


def _check_free(root: Path, service: Service) -> None:
    if environment.service_process(root, service.name) is not None:
        raise ValueError(f"the {service.name} of this checkout is up already: {service.url}")
    if service.health and answers(service.health):
        raise ValueError(
            f"something else answers at {service.url}, perhaps another checkout's {service.name}; "
            f"end it there (`make down`), or set INFLUENCE_{service.setting}_URL to another port"
        )


def _note(root: Path, service: Service, process: psutil.Process) -> None:
    """Write down which process the service is; a number alone may go to another one later."""
    file = root / environment.SERVICES / f"{service.name}.pid"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{process.pid} {process.create_time()}\n")


def _wait(service: Service, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while service.health and not answers(service.health):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ValueError(f"{service.name} did not come up at {service.url}; see {log}")
        time.sleep(0.3)


def _end(process: psutil.Process) -> None:
    """The process and all below it: asked, then killed after `GRACE`."""
    below = [process, *process.children(recursive=True)]
    for each in below:
        _quietly(each.terminate)
    _, alive = psutil.wait_procs(below, timeout=GRACE)
    for each in alive:
        _quietly(each.kill)
    psutil.wait_procs(alive, timeout=GRACE)


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _at(url: str) -> tuple[str, ...]:
    return ("--host", "127.0.0.1", "--port", _port(url))


def _port(url: str) -> str:
    return url.rsplit(":", 1)[1]
