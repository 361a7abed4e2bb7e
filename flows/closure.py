"""Which files of the project a stage's code is: its deps in `dvc.yaml`.

The closure follows every import statement, also those inside functions, from `tasks/<stage>.py`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import store
from tasks.params import read_editable, yaml_text
from tasks.workspace import STAGES

PACKAGES = ("influence", "tasks", "flows")
PIPELINE = Path("dvc.yaml")


def code_of_stage(root: Path, stage: str) -> list[str]:
    """Paths of the modules that `tasks/<stage>.py` imports, itself, and their packages' files."""
    pending, seen = [Path("tasks") / f"{stage}.py"], set[Path]()
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += [*_imports(root, module), *_beside(root, module.parent)]
    return sorted(path.as_posix() for path in seen)


def _imports(root: Path, module: Path) -> Iterator[Path]:
    """The project's modules that one module imports."""
    if module.suffix != ".py":
        return
    for node in ast.walk(ast.parse((root / module).read_text(encoding="utf-8"), str(module))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield from _files(root, name)


def _files(root: Path, name: str) -> Iterator[Path]:
    """The file of a module and the `__init__.py` of each package that holds it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        stem = Path(*parts[:end])
        for file in (stem / "__init__.py", stem.with_suffix(".py")):
            if (root / file).is_file():
                yield file


def _beside(root: Path, folder: Path) -> Iterator[Path]:
    """Templates and styles in a sub-package: its modules read them."""
    if len(folder.parts) > 1:
        for file in sorted((root / folder).rglob("*")):
            if file.is_file() and file.suffix in {".j2", ".html", ".css", ".js"}:
                yield file.relative_to(root)


def stale_deps(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Stages whose deps in `dvc.yaml` are not their code: (missing, superfluous)."""
    stages = read_editable(root / PIPELINE)["stages"]
    stale = {}
    for stage in STAGES:
        told = {dep for dep in _body(stages[stage])["deps"] if is_code(dep)}
        wanted = set(code_of_stage(root, stage))
        if told != wanted:
            stale[stage] = (sorted(wanted - told), sorted(told - wanted))
    return stale


def write_deps(root: Path) -> None:
    """Rewrite the code among each stage's deps in `dvc.yaml`; all else there stays."""
    content = read_editable(root / PIPELINE)
    for stage in STAGES:
        deps = _body(content["stages"][stage])["deps"]
        others = [dep for dep in deps if not is_code(dep)]
        deps[:] = [*code_of_stage(root, stage), *others]
    store.write_text(root / PIPELINE, yaml_text(content))


def is_code(dep: str) -> bool:
    """Whether a dep is a file of the project's packages."""
    return dep.split("/")[0] in PACKAGES


def _body(stage: Any) -> Any:
    return stage.get("do", stage)
