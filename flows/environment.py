"""Settings of the tools, before they are imported: state stays in the checkout, nothing phones."""

import os
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import psutil

from tasks.workspace import outer_root

API_URL = "PREFECT_API_URL"
PARENT_TASK_RUN = "INFLUENCE_PARENT_TASK_RUN"  # under which task of the pipeline a stage nests
LENT_SERVER = "INFLUENCE_LENT_SERVER"  # the API URL is a server that ends with the pipeline
# Where `make up` puts its servers: on this machine only.
PREFECT_URL = os.environ.get("INFLUENCE_PREFECT_URL", "http://127.0.0.1:4200")
REPORTS_URL = os.environ.get("INFLUENCE_REPORTS_URL", "http://127.0.0.1:4201")
MLFLOW_URL = os.environ.get("INFLUENCE_MLFLOW_URL", "http://127.0.0.1:5000")
SERVICES = Path(".prefect/services")  # a log and a process id for each
SERVER_WAIT = 5.0  # seconds; a server that is up answers in a few milliseconds


def set_environment(root: Path) -> None:
    """Defaults for the environment of this process and its children; what is set, stays."""
    home = outer_root(root) / ".prefect"
    defaults = {
        "PREFECT_HOME": str(home),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "storage"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        # The terminal shows our own lines; all of Prefect's are in the run's log in the UI.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "true",  # MLflow ignores 1
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DVC_NO_ANALYTICS": "true",
        "TQDM_DISABLE": "1",  # other libraries' progress bars would cut through our lines
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if API_URL not in os.environ and service_process(outer_root(root), "server"):
        os.environ[API_URL] = f"{PREFECT_URL}/api"


def service_process(root: Path, name: str) -> psutil.Process | None:
    """The process of one of this checkout's services, if it is up."""
    try:
        told = (root / SERVICES / f"{name}.pid").read_text().split()
        process = psutil.Process(int(told[0]))
        # The number may have gone to another process since, and a zombie serves nobody.
        same = str(process.create_time()) == told[1]
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, IndexError, psutil.Error):
        return None


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a child: `python` and `dvc` there are those of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}


def report_url(run: str) -> str:
    """Where the report of a run can be seen from a browser, while `make up` serves it."""
    return f"{REPORTS_URL}/{run}/report/index.html"


def figure_url(benchmark: str, name: str) -> str:
    """Where a figure of a benchmark can be seen from a browser, while `make up` serves it."""
    return f"{REPORTS_URL}/{benchmark}/validate/{name}"


def mlflow_url(experiment: str, run: str) -> str:
    """Where MLflow's UI shows a run."""
    return f"{MLFLOW_URL}/#/experiments/{experiment}/runs/{run}"


def check_server() -> None:
    """That a server answers, where one is named.

    Raises:
        ValueError: if `PREFECT_API_URL` is set and no Prefect server answers there.
    """
    url = os.environ.get(API_URL)
    if not url:
        return
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=SERVER_WAIT):
            return
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{API_URL} is {url}, but no Prefect server answers there ({reason}); start one with "
            f"`make server`, or `unset {API_URL}` to run without"
        ) from error
