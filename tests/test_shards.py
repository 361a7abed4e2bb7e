"""Mapping over shards: nothing lost or counted twice, equal bits, and what a result depends on."""

import dataclasses
import errno
import pickle
import threading
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tasks import runners, shardtasks, store
from tasks.params import load_params
from tasks.shards import Job, ShardRef, map_shards, shards_of, split
from tasks.workspace import StageContext, prepare


@pytest.fixture
def context(tmp_path: Path, root: Path) -> StageContext:
    context = StageContext("smoke", "factors", load_params(root, "smoke"), tmp_path, "f" * 64)
    prepare(context)
    return context


def multiply(context: StageContext, shard: ShardRef, path: Path, scale: int = 1) -> None:
    """A product of matrices large enough for torch to use several threads."""
    items = torch.tensor(list(shard.items), dtype=torch.float32)
    matrix = (items[:, None] * torch.linspace(0, 1, 3000)).sin()
    store.write_tensors(path, {"gram": scale * matrix.mT @ matrix})


def name_thread(context: StageContext, shard: ShardRef, path: Path) -> None:
    told = {"thread": threading.get_ident(), "torch": torch.get_num_threads()}
    store.write_json(path, told)


def fail(context: StageContext, shard: ShardRef, path: Path) -> None:
    if shard.index == 1:
        raise ValueError("shard 1 is bad")
    path.touch()


def forget(context: StageContext, shard: ShardRef, path: Path) -> None:
    """Writes nothing."""


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 50))
def test_split_covers_all_items_in_order_in_even_parts(num_items, num_shards):
    parts = split(num_items, num_shards)
    assert [item for part in parts for item in part.items] == list(range(num_items))
    assert [part.index for part in parts] == list(range(len(parts)))
    assert {part.total for part in parts} == {len(parts)} == {min(num_items, num_shards)}
    sizes = [part.num_items for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_there_must_be_something_to_split():
    with pytest.raises(ValueError, match="0 items in 4 shards: there is nothing"):
        split(0, 4)


def test_shards_of_groups_keep_their_items():
    first, second = shards_of([[3, 1], [2]])
    assert (first.items, second.items) == ((3, 1), (2,))
    assert (second.index, second.total) == (1, 2)


def test_files_come_in_the_order_of_the_shards_and_name_their_place(context):
    files = map_shards(context, multiply, split(10, 4), name="part")
    assert [file.name for file in files] == [
        f"part-{index:05d}-of-00004.safetensors" for index in range(4)
    ]
    assert all(file.parent == context.work for file in files)


def test_equal_runs_give_equal_bits(context):
    first = [store.digest(file) for file in map_shards(context, multiply, split(64, 4))]
    again = [store.digest(file) for file in map_shards(context, multiply, split(64, 4))]
    assert first == again


def test_workers_share_the_cores_and_leave_the_main_thread_alone(context, monkeypatch):
    monkeypatch.setattr(runners, "num_cores", lambda: 6)
    mine = torch.get_num_threads()
    files = map_shards(context, name_thread, split(8, 8), suffix=".json")
    told = [store.read_json(file) for file in files]
    assert {each["torch"] for each in told} == {3}
    assert threading.get_ident() not in {each["thread"] for each in told}
    assert torch.get_num_threads() == mine


def test_more_shards_than_prefect_bears_are_refused(context):
    with pytest.raises(ValueError, match=r"51 shards named 'shard': .* above 50"):
        map_shards(context, multiply, split(51, 51))


def test_an_error_in_a_shard_is_raised_as_it_is(context):
    with pytest.raises(ValueError, match="shard 1 is bad"):
        map_shards(context, fail, split(4, 4))


def test_a_shard_that_writes_nothing_is_a_fault(context):
    with pytest.raises(AssertionError, match="forget did not write"):
        map_shards(context, forget, split(1, 1))


def job(context: StageContext, **changes: Any) -> Job:
    values = {"compute": multiply, "shard": split(10, 2)[0], "name": "a", "suffix": ".json"}
    values |= {"values": {"scale": 1}, "cores": 1, "software": runners.software()}
    return Job(context, **(values | changes))


def test_the_cache_key_changes_with_all_that_a_shard_depends_on(context):
    keys = [
        job(context).cache_key,
        job(context, values={"scale": 2}).cache_key,
        job(context, shard=split(10, 2)[1]).cache_key,
        job(context, shard=split(12, 2)[0]).cache_key,
        job(context, shard=ShardRef(0, 2, (4, 3, 2, 1, 0))).cache_key,
        job(context, name="b").cache_key,
        job(context, compute=name_thread).cache_key,
        job(dataclasses.replace(context, fingerprint="e" * 64)).cache_key,
        job(dataclasses.replace(context, stage="correct")).cache_key,
    ]
    assert len(set(keys)) == len(keys)
    assert job(context).cache_key == keys[0]
    assert job(context, shard=ShardRef(0, 2, (0, 1, 2, 3, 4))).cache_key == keys[0]


def test_a_remembered_file_counts_only_while_it_has_its_content(context):
    one = job(context, suffix=".safetensors")
    result = one.run()
    assert one.holds(result)
    one.path.write_bytes(b"other")
    assert not one.holds(result)
    one.path.unlink()
    assert not one.holds(result)


def test_only_a_hiccup_of_the_file_system_is_tried_again():
    assert shardtasks.is_transient(OSError(errno.ESTALE, "stale"))
    for error in (
        OSError(errno.ENOSPC, "full"),
        store.StorageError(errno.EACCES, "no"),
        ValueError("mine"),
        None,
    ):
        assert not shardtasks.is_transient(error)


def test_a_shard_counts_the_items_that_are_done():
    done: list[int] = []
    shard = ShardRef(0, 1, (7, 8, 9), done.append)
    for seen, item in enumerate(shard.counted()):
        assert item == shard.items[seen]
        assert len(done) == seen
    assert done == [1, 1, 1]
    assert ShardRef(0, 1, (7, 8, 9)) == shard
    assert list(ShardRef(0, 1, (7, 8)).counted()) == [7, 8]


def test_a_worker_with_other_software_is_refused_before_it_computes(context):
    other = "Python 2.7.18, torch 0.1, transformers 0, prefect 0 and the code in /elsewhere"
    one = job(context, software=other)
    with pytest.raises(ValueError, match=r"a worker runs Python 3.*, but the stage Python 2\.7"):
        one.run()
    assert not one.path.exists()


def test_a_job_travels_to_another_process_unopened(context):
    one = job(context)
    sealed = shardtasks._Sealed(one)
    assert sealed.job is one
    once = pickle.loads(pickle.dumps(sealed))
    twice = pickle.loads(pickle.dumps(once))  # a scheduler opens it and sends it on
    assert twice.job == one
    assert twice.job.cache_key == one.cache_key


def test_a_file_that_never_arrives_is_named(context, monkeypatch):
    monkeypatch.setattr(shardtasks, "ARRIVAL", 0.2)
    with pytest.raises(ValueError, match="which is not there on this machine"):
        shardtasks._await_file(context.work / "shard.json")


def test_work_of_a_killed_stage_stays_and_a_half_made_out_goes(context):
    (context.work / "shard-00000-of-00002.safetensors").touch()
    (context.out / "half").touch()
    prepare(context)
    assert [path.name for path in sorted(context.work.iterdir())] == [
        "out",
        "shard-00000-of-00002.safetensors",
    ]
    assert list(context.out.iterdir()) == []
