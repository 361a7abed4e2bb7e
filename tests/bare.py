"""A small project in a bare shell: three toy stages, called where nothing says no to telemetry.

`tokenize` reads a param and writes a large file, `validate` logs to MLflow. Whatever host beyond
this machine is asked for is written down.
"""

import subprocess
from pathlib import Path
from typing import Any

from flows.closure import write_deps
from tasks import store
from tasks.yamlfile import read_editable, yaml_text
from tests.checkout import Checkout, make_checkout

PARAMS = "params/smoke.yaml"
KEPT = ("train", "tokenize", "validate")
SWITCHES = {  # what must say no to telemetry in the process of a stage
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
OTHERS = ("CI", "ITERATIVE_DO_NOT_TRACK")  # they would say no as well
TRAIN = '''"""Toy stage: what its process has brought along, told when it ends."""

import atexit
import os
import sys
import time

from tasks import store


def run(context):
    def tell():
        told = {"environment": dict(os.environ), "modules": sorted(sys.modules)}
        told["cpu_seconds"] = time.process_time()
        store.write_json(context.root / ".work/door.json", told)

    atexit.register(tell)
    store.write_json(context.out / "out.json", "trained")
'''
TOKENIZE = '''"""Toy stage: a large file that a param decides."""

from tasks import store


def run(context):
    store.read_json(context.artifact("train") / "out.json")
    store.write_text(context.out / "large.txt", context.params.tokenize.mode * 300_000)
'''
VALIDATE = '''"""Toy stage: metrics and figures, logged."""

import base64
import time

from tasks import store
from tasks.tracking import Entry, record

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def run(context):
    size = (context.artifact("tokenize") / "large.txt").stat().st_size
    metrics = {"size": size, "ratio": context.params.query.damping.ratio}
    store.write_json(context.out / "metrics.json", metrics)
    for name in ("recall.json", "expected.json", "baselines.parquet"):
        store.write_text(context.out / name, "{}")
    for name in ("spectra.png", "split_half.png", "baselines.png"):
        (context.out / name).write_bytes(base64.b64decode(PNG))
    tags = {"run": context.run, "stage": context.stage, **context.tags}
    entry = Entry("toy", time.time(), context.out / "metrics.json", tags, {}, metrics)
    record(context.root, entry)
'''
LISTENER = '''"""Writes down every host that is asked for, and lets only this machine be."""

import os
import socket

LOCAL = ("localhost", "::1", "127.0.0.1", "0.0.0.0", "", None)
look_up, connect = socket.getaddrinfo, socket.socket.connect


def note(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL:
        with open(os.environ["HOSTS"], "a") as file:
            file.write(f"{host}\\n")
        raise OSError(f"no way to {host}")


def getaddrinfo(host, *more, **options):
    note(host)
    return look_up(host, *more, **options)


def connect_noted(self, address):
    if isinstance(address, tuple):
        note(address[0])
    return connect(self, address)


socket.getaddrinfo, socket.socket.connect = getaddrinfo, connect_noted
'''


class BareCheckout(Checkout):
    """A checkout whose commands are given in a shell where nothing says no to telemetry."""

    @property
    def environment(self) -> dict[str, str]:
        """With the listener in every Python process."""
        left_out = {*SWITCHES, *OTHERS}
        environment = {k: v for k, v in super().environment.items() if k not in left_out}
        home = self.path.parent
        return environment | {"HOME": str(home), "PYTHONPATH": str(home), "HOSTS": str(self.hosts)}

    @property
    def hosts(self) -> Path:
        """The list of hosts that were asked for."""
        return self.path.parent / "hosts"

    def git(self, *arguments: str) -> list[str]:
        """Lines that git says."""
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=self.path, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    def dvc(self, *arguments: str) -> str:
        """What a `dvc` command that succeeds says."""
        done = self.run("dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logged(self) -> list[dict[str, Any]]:
        """Tags and metrics of the MLflow runs of this checkout, the newest first."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.path / 'mlflow.db'}")
        experiments = [each.experiment_id for each in client.search_experiments()]
        runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"])
        return [{**run.data.tags, **run.data.metrics} for run in runs]

    def files(self) -> dict[str, str]:
        """Digests of all artefacts."""
        files = sorted(file for file in (self.path / "artifacts").rglob("*") if file.is_file())
        return {str(file.relative_to(self.path)): store.digest(file) for file in files}


def make_bare_checkout(path: Path, server: str) -> BareCheckout:
    """Toys in place of three stages, the other stages and runs taken out, all committed."""
    make_checkout(path, toy=True)
    for stage, text in zip(KEPT, (TRAIN, TOKENIZE, VALIDATE), strict=True):
        (path / "tasks" / f"{stage}.py").write_text(text)
    write_deps(path)
    pipeline, active = (read_editable(path / name) for name in ("dvc.yaml", "params/active.yaml"))
    for stage in [stage for stage in pipeline["stages"] if stage not in KEPT]:
        del pipeline["stages"][stage]
    for stage in pipeline["stages"].values():
        deps = stage["do"]["deps"]
        deps[:] = [dep for dep in deps if dep.endswith(KEPT) or not dep.startswith("artifacts/")]
    for entries in active.values():
        entries.pop("tinystories", None)
    active["benchmarks"].clear()
    store.write_text(path / "dvc.yaml", yaml_text(pipeline))
    store.write_text(path / "params/active.yaml", yaml_text(active))
    (path.parent / "sitecustomize.py").write_text(LISTENER)
    checkout = BareCheckout(path, server)
    checkout.git("add", ".")
    checkout.git("commit", "-qm", "start")
    return checkout
