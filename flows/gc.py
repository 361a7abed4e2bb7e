"""`python -m flows gc`: remove, or only list, what nothing will use again."""

import argparse
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from flows import environment
from flows.lock import workspace_lock
from tasks.leftovers import Leftover, damaged_cache, leftovers, size_of
from tasks.progress import say

DESCRIPTION = """
Remove what no stage will use again: partial results in .work/ whose inputs have changed, what
Prefect remembers of shards that are gone, checkouts of experiments that were killed. Nothing is
computed again for it. The options remove more.
"""
CACHE_TOLD = """
also all of DVC's cache but what the workspace, a git commit or an experiment has (`dvc gc
--workspace --all-commits --all-experiments`). A value that you tried and neither committed nor
kept as an experiment is then computed again when you go back to it
"""
OLD_TOLD = """
also flow runs that ended more than DAYS ago, with their task runs and logs, from the Prefect server
"""
DAMAGED_TOLD = """
also files of DVC's cache that are not what their name says, because a file in artifacts/ was
edited in place; their stages run again. Reads all artefacts
"""
DVC_GC = ("gc", "--workspace", "--all-commits", "--all-experiments", "--force")
REMOVING = "Removing "  # how `dvc gc --dry` begins a line
PAGE = 200  # flow runs that Prefect gives at once


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("--dry-run", action="store_true", help="only list it")
    parser.add_argument("--cache", action="store_true", help=CACHE_TOLD)
    parser.add_argument("--damaged", action="store_true", help=DAMAGED_TOLD)
    parser.add_argument("--older-than", type=days, metavar="DAYS", help=OLD_TOLD)


def days(text: str) -> timedelta:
    """A number of days."""
    return timedelta(days=float(text))


def run_gc(root: Path, given: argparse.Namespace) -> int:
    """Collect; nothing may be at work in the checkout meanwhile."""
    with workspace_lock(root):
        check_nothing_works(root)
        total = collect_leftovers(root, given.dry_run, given.damaged)
        if given.cache:
            total += collect_cache(root, given.dry_run)
        say(f"{megabytes(total)} {'would be free' if given.dry_run else 'freed'}")
        if given.older_than is not None:
            collect_flow_runs(given.older_than, given.dry_run)
    return 0


def check_nothing_works(root: Path) -> None:
    """That no `dvc` and no stage is at work in the checkout, nor in an experiment's inside it.

    Raises:
        ValueError: naming the process. What it has written and not yet recorded looks abandoned.
    """
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        folder, words = process.info["cwd"], process.info["cmdline"] or []
        works = any(word == "flows.stage" or Path(word).name == "dvc" for word in words)
        if works and folder and Path(folder).is_relative_to(root):
            told = f"{process.info['pid']}: {' '.join(words[1:6])}"
            raise ValueError(f"process {told} is at work in {folder}; wait for it to end")


def collect_leftovers(root: Path, dry_run: bool, damaged: bool) -> int:
    """What no stage will take up; its size."""
    found = leftovers(root) + (damaged_cache(root) if damaged else [])
    for leftover in found:
        tell(root, leftover)
        if not dry_run:
            leftover.remove()
    return sum(leftover.num_bytes for leftover in found)


def collect_cache(root: Path, dry_run: bool) -> int:
    """What DVC's cache has and nobody knows of; its size.

    Raises:
        ValueError: if the cache is not the checkout's own: others may need what this one does not.
    """
    lines = [line for line in dvc(root, *DVC_GC, "--dry") if line.startswith(REMOVING)]
    unused = tuple(Path(line.removeprefix(REMOVING)).resolve() for line in lines)
    if not unused:
        return 0
    cache = unused[0].parents[1]
    if not cache.is_relative_to(root):
        raise ValueError(
            f"DVC's cache ({cache}) is not in {root}, so that other checkouts may need what is "
            "unused here; call `dvc gc` yourself, with --projects"
        )
    found = Leftover(cache, size_of(unused), "in no commit or experiment", unused)
    tell(root, found)
    if not dry_run:
        dvc(root, *DVC_GC)
    return found.num_bytes


def tell(root: Path, leftover: Leftover) -> None:
    """A line: path, size, reason."""
    size = megabytes(leftover.num_bytes)
    if leftover.files is not None:
        size = f"{len(leftover.files)} file{'s' * (len(leftover.files) != 1)}, {size}"
    say(f"{leftover.path.relative_to(root)}  {size}  ({leftover.reason})")


def dvc(root: Path, *arguments: str) -> list[str]:
    """What a `dvc` command says.

    Raises:
        ValueError: if it fails, with its reason.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command, cwd=root, env=environment.child_environment(), capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise ValueError(f"dvc {arguments[0]}: {errors[-1] if errors else done.stderr}")
    return done.stdout.splitlines()


def collect_flow_runs(age: timedelta, dry_run: bool) -> None:
    """Flow runs that ended longer ago than `age`; Prefect's database reuses their space."""
    environment.check_server()
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime

    before: Any = datetime.now(UTC) - age
    ended = FlowRunFilter(end_time=FlowRunFilterEndTime(before_=before))
    found = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=ended, limit=PAGE, offset=len(found)):
            found += page
        for run in [] if dry_run else found:
            client.delete_flow_run(run.id)
    verb = "would be deleted" if dry_run else "deleted"
    server = os.environ.get(environment.API_URL, "the checkout's own database")
    say(f"{len(found)} flow runs that ended more than {age.days} days ago {verb} ({server})")


def megabytes(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 1e6:.1f} MB"
