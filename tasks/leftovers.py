"""Abandoned work: folders in `.work/` that no stage will take up again."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks import dvcstage
from tasks.params import load_params
from tasks.workspace import STAGES, WORK

FOLDER = re.compile(rf"(?P<run>.+)-(?P<stage>{'|'.join(STAGES)})-(?P<fingerprint>[0-9a-f]{{12}})")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder to remove, its size, and why nothing will use it."""

    path: Path
    num_bytes: int
    reason: str

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)


def leftovers(root: Path) -> list[Leftover]:
    """Folders of partial results whose inputs have changed since, or whose run is gone."""
    found = []
    for folder in sorted(path for path in (root / WORK).glob("*") if path.is_dir()):
        reason = _why_abandoned(root, folder.name)
        if reason:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.append(Leftover(folder, size, reason))
    return found


def _why_abandoned(root: Path, name: str) -> str | None:
    """None if the stage would resume there."""
    match = FOLDER.fullmatch(name)
    if match is None:
        return "no stage's folder"
    run, stage = match["run"], match["stage"]
    try:
        runtime = load_params(root, run).runtime
        current = dvcstage.input_fingerprint(root, stage, run, runtime)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None if current.startswith(match["fingerprint"]) else "its inputs have changed"
