"""What every test session shares: one thread, fixed seeds, no network, nothing reported home."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LONGEST = ["test_pipeline.py", "test_ui_doors.py", "test_doors.py", "test_dvc_door.py"]

# Before any test imports the libraries: several read these once, at import. Subprocesses
# inherit them.
os.environ.update(
    DO_NOT_TRACK="true",  # `true`, not 1: MLflow ignores 1
    DVC_NO_ANALYTICS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    ITERATIVE_DO_NOT_TRACK="true",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # test processes run side by side; more threads each only get in the way
    TOKENIZERS_PARALLELISM="false",
)
for variable in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)  # a developer's servers and caches are not the tests' business

# A job that a script put into the background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: begun last, one of them would keep one process busy alone.

    Tests marked `gpu` are skipped, with the reason, where there is no CUDA device.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout: the folder of pyproject.toml and dvc.yaml."""
    return ROOT


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Tests may draw from torch's global generator; none depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse connections that leave this machine, so that a hidden download fails here first."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address):
        host = address[0] if isinstance(address, tuple) else "localhost"  # else a Unix socket
        if str(host) not in ("localhost", "::1", "0.0.0.0", "") and not str(host).startswith(
            "127."
        ):
            raise OSError(f"tests run without a network, but something connected to {address!r}")
        return connect(self, address)

    socket.socket.connect = connect_locally
    yield
    socket.socket.connect = connect
