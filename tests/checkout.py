"""Copies of this checkout to run real commands in, with real stages or with toy ones."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows.closure import write_deps
from flows.witness import LATER
from tasks.validation.context import FIGURES, RESULT, SCORES
from tasks.workspace import STAGES, WORK

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("flows", "influence", "params", "tasks", "data")
FILES = (
    *("dvc.yaml", "validation/dvc.yaml", "pyproject.toml"),
    *(".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"),
)
HOLD = "hold"  # while a file of this name is at the root, shards from the third on wait
READS = {
    "tokenize": ["train"],
    "filter": ["tokenize"],
    "factors": ["tokenize"],
    "eigen": ["factors"],
    "correct": ["eigen"],
    "query": ["correct"],
    "stream": ["filter", "query"],
    "score": ["stream"],
    "validate": ["score"],
    "report": ["validate"],
}
PARAMS = {
    "tokenize": "context.params.tokenize.mode",
    "query": "context.params.query.damping",
    "benchmark": "context.params.damping",
}
OUTS = {
    "validate": (
        *("baselines.parquet", "recall.json", "expected.json", "metrics.json"),
        *("spectra.png", "split_half.png", "baselines.png"),
    ),
    "benchmark": (RESULT, SCORES, *FIGURES),
}
TOY = '''"""Toy stage."""

from pathlib import Path

from tasks import store
from tasks.shards import ShardRef, map_shards, split
from tasks.workspace import StageContext


def run(context: StageContext) -> None:
    told = [store.digest(context.artifact(name)) for name in {reads!r}]
    told.append(str({param}))
    shards = split(40, {shards})
    parts = map_shards(context, compute, shards, suffix=".json", told=told)
    for name in {outs!r}:
        store.write_json(context.out / name, [store.read_json(part) for part in parts])


def compute(context: StageContext, shard: ShardRef, path: Path, told: list[str]) -> None:
    if (context.root / "bad").exists() and shard.index == 1:
        raise ValueError("shard 1 is bad; mend it")
    if (context.root / "broken").exists():
        raise RuntimeError("this is our fault")
    store.write_json(path, [context.stage, sum(shard.items), *told])
'''
HELD = """        if (self.context.root / "hold").exists() and self.shard.index > 1:
            name = f"held-{self.context.run}-{self.context.stage}-{self.shard.index}"
            (self.context.root / name).touch()
            while (self.context.root / "hold").exists():
                __import__("time").sleep(0.02)
        self.compute("""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A copy of the project in `path`, with the environment for its commands."""

    path: Path
    server: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with this Python first and Prefect's state in the copy."""
        environment = dict(os.environ)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment["SHELL"] = "/bin/sh"  # the harder case: some of its kind fork
        environment["INFLUENCE_PLAN"] = "no"  # seconds that most tests can spare
        environment |= {"PREFECT_API_URL": self.server} if self.server else {}
        return environment | dict(self.extra)

    @contextlib.contextmanager
    def started(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A command at the root of the copy, `python …` or `dvc …`; ended with all below it."""
        with subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                end_tree(process.pid)

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        with self.started(*command) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stage(self, stage: str, run: str = "smoke") -> subprocess.CompletedProcess[str]:
        """`python -m flows.stage`."""
        return self.run("python", "-m", "flows.stage", stage, run)

    def pipeline(self, until: str, run: str = "smoke") -> subprocess.CompletedProcess[str]:
        """`python -m flows.pipeline`."""
        return self.run("python", "-m", "flows.pipeline", run, "--until", until)

    def shards(self, stage: str, run: str = "smoke") -> list[Path]:
        """Files of finished shards that a stage left in `.work/`."""
        return sorted((self.path / WORK).glob(f"{run}-{stage}-*/*-of-*"))

    def artifact(self, stage: str, run: str = "smoke") -> Path:
        """A stage's published folder."""
        return self.path / "artifacts" / run / stage

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace text in a file."""
        text = (self.path / file).read_text()
        assert old in text
        (self.path / file).write_text(text.replace(old, new, 1))

    @contextlib.contextmanager
    def flag(self, name: str) -> Iterator[None]:
        """While a file of this name is at the root."""
        (self.path / name).touch()
        try:
            yield
        finally:
            (self.path / name).unlink()
            for held in self.path.glob("held-*"):
                held.unlink()

    def wait_held(self, stage: str, run: str = "smoke") -> None:
        """While `hold` is there: until two shards of a stage have ended and the next two wait.

        Each of its two workers takes another shard only when Prefect has noted the one before:
        what is killed then will be found.
        """
        name = f"held-{run}-{stage}-*"
        wait_for(lambda: len(list(self.path.glob(name))) == 2, 120, f"{stage} to be held")
        assert len(self.shards(stage, run)) == 2


def make_checkout(path: Path, server: str | None = None, toy: bool = False) -> Checkout:
    """A copy with git and DVC; `toy`: every stage is a toy without torch, and git is empty.

    The one change to the code that is tested: shards from the third on wait for the flag `hold`.
    """
    for name in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, path / name, ignore=ignore, copy_function=shutil.copy)
    for name in FILES:
        (path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    checkout = Checkout(path, server)
    checkout.edit("tasks/shards.py", "        self.compute(", HELD)
    if toy:
        _write_toys(path)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    commands = [["init", "-q"], ["add", "."], ["commit", "-qm", "start"]]
    for command in commands[:1] if toy else commands:
        subprocess.run([*git, *command], cwd=path, check=True, capture_output=True)
    return checkout


def _write_toys(path: Path) -> None:
    for stage in (*STAGES, "benchmark"):
        reads, param = READS.get(stage, []), PARAMS.get(stage, "0")
        outs = OUTS.get(stage, ("out.json",))
        shards = 4 if stage == "benchmark" else "context.params.runtime.shards"
        text = TOY.format(reads=reads, param=param, outs=outs, shards=shards)
        (path / "tasks" / f"{stage}.py").write_text(text)
    write_deps(path)


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server on a free port of this machine; its API URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    environment = os.environ | {"PREFECT_HOME": str(home)}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: _answers(f"{url}/health"), 120, "the Prefect server")
        yield url
    finally:
        end_tree(process.pid)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds; fail with what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def processes_below(pid: int) -> list[psutil.Process]:
    """The living children of a process, theirs, and so on."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def outlive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still at work after so many seconds; a zombie is not, whoever reaps it.

    A witness has as long again as it goes on looking for what the server learns of late.
    """
    witnesses = [each for each in processes if _is_witness(each)]
    others = [each for each in processes if each not in witnesses]
    alive = []
    for some, limit in ((others, seconds), (witnesses, seconds + 2 * sum(LATER))):
        deadline = time.monotonic() + limit
        while (left := [each for each in some if _works(each)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        alive += left
    return alive


def _is_witness(process: psutil.Process) -> bool:
    try:
        return "flows.witness" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _works(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stage_process(pid: int) -> psutil.Process | None:
    """The process of a stage below a process, or it itself."""
    for process in (psutil.Process(pid), *processes_below(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            if "flows.stage" in line and Path(line[0]).name.startswith("python"):
                return process
    return None


def end_tree(pid: int) -> None:
    """Kill a process and all below it, if they are still there."""
    for number in [*(process.pid for process in processes_below(pid)), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
