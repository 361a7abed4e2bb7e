"""Where a result comes from, as tags: run, git commit, digests of what went in, who ran it."""

import subprocess
from pathlib import Path

from tasks import dvcstage
from tasks.params import params_file
from tasks.workspace import STAGES, StageContext

CODE = ("flows", "influence", "tasks", "dvc.yaml")


def tags(context: StageContext) -> dict[str, str]:
    """All tags of one execution."""
    earlier = STAGES[: STAGES.index(context.stage)]
    digests = dvcstage.recorded_digests(context.root, context.run, earlier)
    return {
        "run": context.run,
        "stage": context.stage,
        "fit": context.fit or context.run,
        "fingerprint": context.fingerprint,
        **git_tags(context.root, context.run),
        **{f"dvc.{name}": digest for name, digest in digests.items()},
        **context.tags,
    }


def git_tags(root: Path, run: str) -> dict[str, str]:
    """The commit, and whether code or this run's params differ from it, and which files.

    Other files do not count: `dvc.lock` is written while the pipeline runs, and the digests of
    inputs and artefacts are tags of their own.
    """
    commit = _git(root, "rev-parse", "--quiet", "--verify", "HEAD").strip()
    if not commit:
        return {"git.commit": "none", "git.dirty": "unknown"}
    status = _git(root, "status", "--porcelain", "--", *CODE, params_file(run).as_posix())
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
