"""Settings of the tools, before they are imported: state stays in the checkout, nothing phones."""

import os
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

from tasks.workspace import outer_root

API_URL = "PREFECT_API_URL"
PARENT_TASK_RUN = "INFLUENCE_PARENT_TASK_RUN"  # under which task of the pipeline a stage nests
LENT_SERVER = "INFLUENCE_LENT_SERVER"  # the API URL is a server that ends with the pipeline
SERVER_WAIT = 5.0  # seconds; a server that is up answers in a few milliseconds


def set_environment(root: Path) -> None:
    """Defaults for the environment of this process and its children; what is set, stays."""
    home = outer_root(root) / ".prefect"
    defaults = {
        "PREFECT_HOME": str(home),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "storage"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
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


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a child: `python` and `dvc` there are those of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}


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
