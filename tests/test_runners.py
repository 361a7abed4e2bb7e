"""Threads, Dask and Ray: the same bytes from each, here and on a cluster that was there before."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import ValidationError

from tasks import runners, store, workers
from tasks.dvcstage import FREE_OF_PARTIALS
from tasks.params import Runtime, load_params
from tasks.shards import ShardRef, map_shards, split
from tasks.workspace import StageContext, prepare
from tests.checkout import (
    HOLD,
    Checkout,
    end_tree,
    make_checkout,
    prefect_server,
    processes_below,
    wait_for,
)

PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}
BIN = Path(sys.executable).parent
HERE = "127.0.0.1"
CLUSTER = {  # a Ray of this machine alone, with a password
    runners.RAY_ON_LOOPBACK: "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
}
both = pytest.mark.parametrize("runner", list(PACKAGES))


def installed(runner: str) -> str:
    """The runner; the test is skipped where its extra is not installed."""
    pytest.importorskip(PACKAGES[runner], reason=f"the extra `{runner}` is not installed")
    return runner


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """What a runner sets for the processes that it starts is not the other tests' business."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def runtime(root: Path) -> Callable[..., Runtime]:
    """The run `smoke`'s settings, with changes, checked."""

    def changed(**changes: object) -> Runtime:
        given = load_params(root, "smoke").runtime.model_dump() | changes
        return Runtime.model_validate(given)

    return changed


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"address": "tcp://a:8786"}, "is for dask and ray, and runner is threads"),
        ({"runner": "dask", "address": "ray://a:10001"}, "wanted tcp://host:8786 for runner dask"),
        ({"runner": "ray", "address": "tcp://a:8786"}, "wanted ray://host:10001 or host:6379"),
        ({"runner": "dask", "address": "tcp://a:1", "device": "auto"}, "write cpu, cuda or spread"),
        ({"runner": "dask", "gpus_per_task": 1}, "gpus_per_task 1 is for Ray"),
        ({"runner": "ray", "gpus_per_task": 1}, "device cpu and gpus_per_task 1 do not go"),
        ({"runner": "ray", "device": "cuda"}, "device cuda and gpus_per_task 0 do not go"),
        ({"runner": "ray", "device": "spread", "gpus_per_task": 1}, "spread and 2 or more"),
        ({"runner": "ray", "device": "cuda", "gpus_per_task": 1.5}, "whole GPUs only"),
        ({"runner": "ray", "gpus_per_task": -1}, "greater than or equal to 0"),
        ({"runner": "spark"}, "'threads', 'dask' or 'ray'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(runtime, changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        runtime(**changes)


def test_settings_that_go_together_pass(runtime):
    runtime(runner="dask", address="tls://10.0.0.1:8786", device="cuda")
    for gpus in (0.5, 1, 2):
        runtime(runner="ray", address="head:6379", device="cuda", gpus_per_task=gpus)
    runtime(runner="ray", address="head:6379", device="spread", gpus_per_task=2)


def test_who_computes_is_free_to_change_in_the_middle_of_a_stage():
    fixed = {"device", "tokens_per_batch", "shards", "dtype"}
    assert set(Runtime.model_fields) - FREE_OF_PARTIALS == fixed
    assert set(Runtime.model_fields) >= FREE_OF_PARTIALS


@both
def test_a_missing_extra_is_named_with_the_command(runtime, runner, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[runner], None)
    monkeypatch.setitem(sys.modules, f"{PACKAGES[runner]}.task_runners", None)
    with pytest.raises(ValueError, match=rf"prefect-{runner} is not installed.*'\.\[{runner}\]'"):
        runners.task_runner(runtime(runner=runner))


@both
def test_our_own_cluster_has_the_workers_asked_for_and_listens_to_nobody_else(runtime, runner):
    made = runners.task_runner(runtime(runner=installed(runner), workers=3))
    if runner == "dask":
        kwargs = made.cluster_kwargs
        assert (kwargs["n_workers"], kwargs["threads_per_worker"]) == (3, 1)
        assert kwargs["host"] == HERE
        assert kwargs["dashboard_address"].startswith(HERE)
    else:
        share = runners.cores_of_shard(runtime(runner=runner, workers=3))
        assert made.init_kwargs["num_cpus"] == 3 * share
        assert made.init_kwargs["include_dashboard"] is False
        assert made.address == "local"
        told = {name: os.environ[name] for name in CLUSTER}
        assert told == CLUSTER | {"RAY_AUTH_TOKEN": told["RAY_AUTH_TOKEN"]}
        # The path of a socket in there must not be longer than 107 characters.
        assert len(made.init_kwargs["_temp_dir"]) < 40


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HERE, 0))
        return free.getsockname()[1]


def test_an_address_where_nothing_answers_is_named():
    address = f"tcp://{HERE}:{free_port()}"
    with pytest.raises(ValueError, match=f"{address}, but nothing answers there"):
        runners.check_address(address)


def test_workers_elsewhere_need_a_prefect_server_that_they_can_reach(monkeypatch):
    with socket.create_server((HERE, 0)) as listening:
        address = f"{HERE}:{listening.getsockname()[1]}"
        runners.check_address(address)
        # As if that address were another machine's.
        monkeypatch.setattr(runners, "_is_here", lambda host: host != HERE)
        monkeypatch.setenv("PREFECT_API_URL", "http://localhost:4200/api")
        with pytest.raises(ValueError, match="cannot reach a Prefect server that listens on this"):
            runners.check_address(address)
        monkeypatch.setenv("PREFECT_API_URL", f"http://{HERE}:4200/api")
        runners.check_address(address)


def test_ray_gives_a_shard_its_cores_and_gpus(runtime, monkeypatch):
    installed("ray")
    import ray
    from prefect_ray.context import RemoteOptionsContext

    nodes = [{"Alive": True, "Resources": {"CPU": 4, "GPU": 1}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(runners, "num_cores", lambda: 16)
    given = runtime(runner="ray", address="head:6379", workers=4, device="cuda", gpus_per_task=0.5)
    with workers._on_ray(given, "http://head:4200/api"):
        options = RemoteOptionsContext.get().current_remote_options
    assert (options["num_cpus"], options["num_gpus"]) == (4, 0.5)
    assert options["runtime_env"]["env_vars"] == {"PREFECT_API_URL": "http://head:4200/api"}


def test_what_no_machine_of_the_cluster_has_is_named():
    wanted: dict[str, float] = {"CPU": 8, "GPU": 1}
    workers.check_means(wanted, [{"CPU": 4}, {"CPU": 8, "GPU": 2, "memory": 1e9}])
    complaint = r"8 CPUs and 1 GPUs, which no machine .* \(4 CPUs and 2 GPUs; 16 CPUs and 0 GPUs\)"
    with pytest.raises(ValueError, match=complaint):
        workers.check_means(wanted, [{"CPU": 4, "GPU": 2}, {"CPU": 16}])
    with pytest.raises(ValueError, match="no machine"):
        workers.check_means(wanted, [])


def test_a_worker_is_told_no_secret(monkeypatch):
    for name in ("PREFECT_API_KEY", "HF_TOKEN", "PREFECT_HOME"):
        monkeypatch.setenv(name, "told")
    told = runners.told_environment()
    assert told["PREFECT_HOME"] == "told"
    assert not {"PREFECT_API_KEY", "HF_TOKEN"} & set(told)
    assert told["PYTHONPATH"].split(os.pathsep)[0] == str(runners.CODE)


# With real servers and workers.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def context_of(root: Path, path: Path, runtime: Runtime) -> StageContext:
    params = load_params(root, "smoke").model_copy(update={"runtime": runtime})
    context = StageContext("smoke", "factors", params, path, "f" * 64)
    prepare(context)
    return context


def multiply(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Products whose rounding depends on the number of threads; and who computed them."""
    items = torch.tensor(list(shard.items), dtype=torch.float32)
    matrix = (items[:, None] * torch.linspace(0, 1, 1500)).sin()
    store.write_tensors(path, {"gram": matrix.mT @ matrix, "sum": matrix.sum()})
    with (context.root / "computed").open("a") as file:
        file.write(f"{json.dumps([os.getpid(), torch.get_num_threads()])}\n")


def fail(context: StageContext, shard: ShardRef, path: Path) -> None:
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte")  # its class takes five arguments


def mapped(context: StageContext, server: str, compute: Callable[..., None]) -> list[str]:
    """Digests of the files that `map_shards` makes in a flow, as in a stage."""
    from prefect import flow
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    def stage() -> list[str]:
        return [store.digest(file) for file in map_shards(context, compute, split(512, 4))]

    runner = runners.task_runner(context.params.runtime)
    settings = {PREFECT_API_URL: server, PREFECT_HOME: context.root / "home"}
    with temporary_settings({**settings, PREFECT_LOGGING_TO_API_ENABLED: False}):
        return flow(name="stage", task_runner=runner, persist_result=False)(stage)()


@pytest.mark.doors
@both
def test_two_processes_compute_on_as_many_cores_and_give_the_same_bits(
    root, tmp_path, server, runtime, runner, monkeypatch, capsys
):
    monkeypatch.setattr(runners, "num_cores", lambda: 4)
    alone = context_of(root, tmp_path / "threads", runtime())
    shared = context_of(root, tmp_path / runner, runtime(runner=installed(runner)))
    wanted = mapped(alone, server, multiply)
    assert mapped(shared, server, multiply) == wanted
    lines = (shared.root / "computed").read_text().splitlines()
    computed = [json.loads(line) for line in lines]
    assert {cores for _, cores in computed} == {2}
    assert os.getpid() not in {process for process, _ in computed}
    assert len({process for process, _ in computed}) == 2
    capsys.readouterr()
    resumed = context_of(root, shared.root, runtime())
    assert mapped(resumed, server, multiply) == wanted
    assert capsys.readouterr().out.count("was there already") == 4
    assert len((shared.root / "computed").read_text().splitlines()) == 4


@pytest.mark.doors
@both
def test_an_error_in_a_process_arrives_as_its_sentence(root, tmp_path, server, runtime, runner):
    context = context_of(root, tmp_path, runtime(runner=installed(runner)))
    with pytest.raises(ValueError, match="decode byte 0xff in position 0: bad byte") as error:
        mapped(context, server, fail)
    assert type(error.value) is ValueError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: str) -> Checkout:
    """A checkout in which the run `smoke` has got its scores, with threads."""
    checkout = make_checkout(tmp_path_factory.mktemp("finished") / "project", server)
    done = checkout.pipeline("score")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


@pytest.mark.doors
@both
def test_real_stages_write_the_same_bytes(finished, tmp_path, runner):
    shutil.copytree(finished.path, tmp_path / "project", copy_function=shutil.copy)
    checkout = Checkout(tmp_path / "project", finished.server)
    checkout.edit("params/smoke.yaml", "runner: threads", f"runner: {installed(runner)}")
    for stage in ("factors", "correct", "stream", "score"):
        shutil.rmtree(checkout.artifact(stage))
        done = checkout.stage(stage)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        files = sorted(file for file in finished.artifact(stage).rglob("*") if file.is_file())
        assert files
        for file in files:
            again = checkout.artifact(stage) / file.relative_to(finished.artifact(stage))
            assert store.digest(again) == store.digest(file), f"{stage}: {file.name}"


@pytest.mark.doors
@both
def test_kill_9_leaves_no_process_and_threads_take_up_what_is_there(server, tmp_path, runner):
    checkout = make_checkout(tmp_path / "project", server, toy=True)
    checkout.edit("params/smoke.yaml", "runner: threads", f"runner: {installed(runner)}")
    command = ("python", "-m", "flows.stage", "train", "smoke")
    with checkout.flag(HOLD), checkout.started(*command) as process:
        checkout.wait_held("train")
        below = processes_below(process.pid)
        assert len(below) >= 3
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(below, timeout=10)
        assert not alive
    checkout.edit("params/smoke.yaml", f"runner: {runner}", "runner: threads")
    done = checkout.stage("train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was there already") == 2


@contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of this environment at the root of the file system; ended with all below it."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([BIN / words[0], *words[1:]], cwd="/", **quiet) as process:
        try:
            yield process
        finally:
            end_tree(process.pid)


@contextmanager
def dask_cluster(folder: Path) -> Iterator[list[str]]:
    """A scheduler and two workers by Dask's own commands; the scheduler's address."""
    file, here = folder / "scheduler.json", ("--host", HERE, "--no-dashboard")
    told = ("--scheduler-file", str(file))
    with command("dask", "scheduler", *told, *here, "--port", "0"):
        wait_for(file.is_file, 60, "Dask's scheduler")
        with command("dask", "worker", *told, *here, "--nworkers", "2", "--nthreads", "1"):
            yield [json.loads(file.read_text())["address"]]


@contextmanager
def ray_cluster(folder: Path) -> Iterator[list[str]]:
    """A head by Ray's own command; its address for clients elsewhere, and for those beside it."""
    os.environ.update(CLUSTER)
    head, client = free_port(), free_port()
    ports = ("--port", str(head), "--ray-client-server-port", str(client))
    means = ("--num-cpus", "2", "--object-store-memory", str(runners.OBJECT_STORE))
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short,
        command("ray", "start", "--head", *ports, *means, "--temp-dir", short, "--block"),
    ):
        for port in (head, client):
            wait_for(lambda port=port: answers(port), 120, "Ray's head")
        yield [f"ray://{HERE}:{client}", f"{HERE}:{head}"]


def answers(port: int) -> bool:
    with socket.socket() as socket_:
        return socket_.connect_ex((HERE, port)) == 0


@pytest.mark.doors
@both
def test_a_cluster_that_was_there_runs_the_code_of_now(server, tmp_path, runner):
    installed(runner)
    checkout = make_checkout(tmp_path / "project", server, toy=True)
    wanted = checkout.stage("train")
    assert wanted.returncode == 0, wanted.stderr
    result = checkout.artifact("train") / "out.json"
    expected = store.read_json(result)
    checkout.edit("params/smoke.yaml", "runner: threads", f"runner: {runner}")
    with (dask_cluster if runner == "dask" else ray_cluster)(tmp_path) as addresses:
        told = "null"
        for address in addresses:
            checkout.edit("params/smoke.yaml", f"address: {told}", f"address: {address}")
            told = address
            result.unlink()
            done = checkout.stage("train")
            assert done.returncode == 0, done.stderr
            assert store.read_json(result) == expected
        # A worker that has seen this code must not run it when it has changed.
        checkout.edit("tasks/train.py", "sum(shard.items)", "1000 + sum(shard.items)")
        done = checkout.stage("train")
        assert done.returncode == 0, done.stderr
        changed = [[stage, 1000 + total, *rest] for stage, total, *rest in expected]
        assert store.read_json(result) == changed
        with checkout.flag("bad"):
            checkout.edit("tasks/train.py", "1000 + sum(shard.items)", "2000 + sum(shard.items)")
            done = checkout.stage("train")
        assert done.stderr == "train@smoke: error: shard 1 is bad; mend it\n"
