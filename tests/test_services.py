"""`make up` and `make down`: the background services, on free ports of this machine."""

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkout import Checkout, make_checkout, outlive

NAMES = ("server", "worker", "mlflow", "reports")


def free_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    names = ("PREFECT", "REPORTS", "MLFLOW")
    extra = {f"INFLUENCE_{name}_URL": free_url() for name in names}
    path = tmp_path_factory.mktemp("services") / "project"
    checkout = Checkout(make_checkout(path, toy=True).path, None, extra)
    yield checkout
    checkout.run("python", "-m", "flows", "down")


def services(checkout: Checkout) -> dict[str, psutil.Process]:
    """The processes of the services that are up."""
    folder = checkout.path / ".prefect/services"
    files = {name: folder / f"{name}.pid" for name in NAMES}
    numbers = {n: int(file.read_text().split()[0]) for n, file in files.items() if file.exists()}
    return {n: psutil.Process(pid) for n, pid in numbers.items() if psutil.pid_exists(pid)}


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def test_a_worker_without_a_server_is_told_what_to_do(checkout):
    done = checkout.run("python", "-m", "flows", "serve", "worker")
    assert done.returncode == 1
    assert "run `make server`" in done.stderr
    done = checkout.run("python", "-m", "flows", "deploy")
    assert done.returncode == 1
    assert "run `make up`" in done.stderr


@pytest.mark.doors
def test_up_starts_all_once_light_and_for_this_machine_only(checkout):
    done = checkout.run("python", "-m", "flows", "up")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(started)") == len(NAMES)
    up = services(checkout)
    assert set(up) == set(NAMES)
    again = checkout.run("python", "-m", "flows", "up")
    assert again.stdout.count("(was up already)") == len(NAMES)
    assert {name: each.pid for name, each in services(checkout).items()} == {
        name: each.pid for name, each in up.items()
    }

    urls = checkout.extra
    assert get(f"{urls['INFLUENCE_PREFECT_URL']}/api/health") == "true"
    assert urls["INFLUENCE_PREFECT_URL"] in get(f"{urls['INFLUENCE_PREFECT_URL']}/ui-settings")
    assert get(f"{urls['INFLUENCE_MLFLOW_URL']}/health") == "OK"
    page = checkout.path / "artifacts/some/report/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("a report")
    assert get(f"{urls['INFLUENCE_REPORTS_URL']}/some/report/index.html") == "a report"

    below = [each for one in up.values() for each in (one, *one.children(recursive=True))]
    listening = {
        link.laddr.ip
        for each in below
        for link in each.net_connections(kind="inet")
        if link.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    mlflow = [up["mlflow"], *up["mlflow"].children(recursive=True)]
    assert sum(each.memory_info().rss for each in mlflow) < 1e9


@pytest.mark.doors
def test_commands_find_the_server_and_another_checkout_is_warned(checkout, tmp_path):
    told = checkout.run(
        "python",
        "-c",
        "import os; from pathlib import Path; from flows import environment\n"
        "environment.set_environment(Path.cwd()); print(os.environ['PREFECT_API_URL'])",
    )
    assert told.stdout.strip() == f"{checkout.extra['INFLUENCE_PREFECT_URL']}/api"
    other = make_checkout(tmp_path / "other", toy=True)
    done = Checkout(other.path, None, checkout.extra).run("python", "-m", "flows", "up")
    assert done.returncode == 1
    assert "something else answers at" in done.stderr
    assert "make down" in done.stderr


@pytest.mark.doors
def test_down_ends_all(checkout):
    up = services(checkout)
    below = [each for one in up.values() for each in (one, *one.children(recursive=True))]
    done = checkout.run("python", "-m", "flows", "down")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ended") == len(NAMES)
    assert not outlive(below, 5)
    assert not list(Path(checkout.path / ".prefect/services").glob("*.pid"))
