"""What `dvc.yaml` must say of a stage: the files that are its code, and the params that it reads.

The closure follows every import statement, also those inside functions, from `tasks/<stage>.py`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import store
from tasks.params import RunParams
from tasks.workspace import STAGES
from tasks.yamlfile import read_editable, yaml_text

PACKAGES = ("influence", "tasks", "flows")
PIPELINE = Path("dvc.yaml")
PARAMS_FILE = "params/${key}.yaml"


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


def stale_deps(root: Path) -> dict[str, str]:
    """Stages whose deps or params in `dvc.yaml` are not what their code needs, and how."""
    stages = read_editable(root / PIPELINE)["stages"]
    stale = {}
    for stage in STAGES:
        body = _body(stages[stage])
        told = {dep for dep in body["deps"] if is_code(dep)} | set(_tracked(body))
        wanted = {*code_of_stage(root, stage), *params_of_stage(root, stage)}
        faults = [f"lacks {each}" for each in sorted(wanted - told)]
        faults += [f"has {each} too much" for each in sorted(told - wanted)]
        if faults:
            stale[stage] = ", ".join(faults)
    return stale


def write_deps(root: Path) -> None:
    """Rewrite the code and the params among each stage's deps in `dvc.yaml`; the rest stays."""
    content = read_editable(root / PIPELINE)
    for stage in STAGES:
        body = _body(content["stages"][stage])
        others = [dep for dep in body["deps"] if not is_code(dep)]
        body["deps"][:] = [*code_of_stage(root, stage), *others]
        keys = sorted(params_of_stage(root, stage))
        body.pop("params", None)
        if keys:
            body.insert(list(body).index("deps") + 1, "params", [{PARAMS_FILE: keys}])
    store.write_text(root / PIPELINE, yaml_text(content))


def _tracked(body: Any) -> list[str]:
    return [key for entry in body.get("params", []) for key in entry[PARAMS_FILE]]


def params_of_stage(root: Path, stage: str) -> set[str]:
    """Keys of the params file that a stage's code reads, a section or section.key: `query.path`.

    What follows a name or attribute `params` in the code. `runtime` is left out: it is not tracked.
    """
    sections = {field.alias or name for name, field in RunParams.model_fields.items()}
    found = set[str]()
    for module in code_of_stage(root, stage):
        if module.endswith(".py"):
            found |= _params_read((root / module).read_text(encoding="utf-8"), sections)
    # A whole section that is read somewhere covers its keys.
    return {key for key in found if "." not in key or key.split(".")[0] not in found}


def _params_read(code: str, sections: set[str]) -> set[str]:
    nodes = list(ast.walk(ast.parse(code)))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    chains = [_keys_after_params(node) for node in nodes if id(node) not in inner]
    return {
        ".".join(keys[:1] if keys[1:2] == ["model_dump"] else keys[:2])
        for keys in chains
        if keys and keys[0] in sections - {"runtime"}
    }


def _keys_after_params(node: ast.AST) -> list[str]:
    """["query", "path"] for the expression `….params.query.path`; [] for others."""
    keys: list[str] = []
    while isinstance(node, ast.Attribute):
        if node.attr == "params":
            return keys
        keys.insert(0, node.attr.rstrip("_"))
        node = node.value
    return keys if isinstance(node, ast.Name) and node.id == "params" else []


def is_code(dep: str) -> bool:
    """Whether a dep is a file of the project's packages."""
    return dep.split("/")[0] in PACKAGES


def _body(stage: Any) -> Any:
    return stage.get("do", stage)
