"""Where a result comes from, as tags: run, git commit, digests of what went in, who ran it."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks import dvcstage
from tasks.active import PIPELINE, VALIDATION
from tasks.params import params_file
from tasks.workspace import STAGES, Context, StageContext

CODE = ("flows", "influence", "tasks")


def tags(context: StageContext) -> dict[str, str]:
    """All tags of one execution of a run's stage."""
    earlier = STAGES[: STAGES.index(context.stage)]
    digests = dvcstage.recorded_digests(context.root, context.run, earlier)
    files = (params_file(context.run), PIPELINE)
    return {"fit": context.fit or context.run, **_tags(context, files, digests)}


def benchmark_tags(context: Context, params: Path) -> dict[str, str]:
    """All tags of one execution of a benchmark, whose params are in the file `params`."""
    digests = dvcstage.input_digests(context.root, context.stage, context.run)
    return _tags(context, (params, VALIDATION), digests)


def _tags(context: Context, files: Sequence[Path], digests: Mapping[str, str]) -> dict[str, str]:
    return {
        "run": context.run,
        "stage": context.stage,
        "fingerprint": context.fingerprint,
        **git_tags(context.root, *files),
        **{f"dvc.{name}": digest for name, digest in digests.items()},
        **context.tags,
    }


def git_tags(root: Path, *files: Path) -> dict[str, str]:
    """The commit, and whether code or these files differ from it, and which.

    Other files do not count: `dvc.lock` is written while the pipeline runs, and the digests of
    inputs and artefacts are tags of their own.
    """
    commit = _git(root, "rev-parse", "--quiet", "--verify", "HEAD").strip()
    if not commit:
        return {"git.commit": "none", "git.dirty": "unknown"}
    status = _git(root, "status", "--porcelain", "--", *CODE, *map(str, files))
    changed = [line[3:] for line in status.splitlines()]
    tags = {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}
    return {**tags, "git.changed": ", ".join(changed)} if changed else tags


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where there is no repository, no commit or no git."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
