"""What each `dvc.yaml` must say of a stage: the files that are its code, the params that it reads.

The closure follows every import statement, also those inside functions, from `tasks/<stage>.py`;
from `tasks/benchmark.py` for the one stage of benchmarks.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import store
from tasks.active import PIPELINE, VALIDATION
from tasks.params import RunParams
from tasks.validation.settings import BenchmarkParams, benchmark_file
from tasks.workspace import STAGES
from tasks.yamlfile import read_editable, yaml_text

PACKAGES = ("influence", "tasks", "flows")
PIPELINES = (PIPELINE, VALIDATION)
PARAMS_FILE = "params/${key}.yaml"
BENCHMARK_PARAMS_FILE = benchmark_file("${key}").as_posix()


@dataclass(frozen=True, slots=True)
class Declared:
    """A stage of a `dvc.yaml`: what it says there, and what the code needs.

    Attributes:
        name: of the stage, as DVC is told.
        body: the entry in the file, which may be changed.
        params_file: whose keys it tracks.
        code: the modules that it should name.
        keys: the keys that it should track.
    """

    name: str
    body: Any
    params_file: str
    code: list[str]
    keys: set[str]

    def faults(self) -> list[str]:
        """Where the file is behind the code."""
        told = {dep for dep in self.body["deps"] if is_code(dep)}
        told |= set(_tracked(self.body, self.params_file))
        wanted = {*self.code, *self.keys}
        lacks = [f"lacks {each}" for each in sorted(wanted - told)]
        return lacks + [f"has {each} too much" for each in sorted(told - wanted)]

    def mend(self) -> None:
        """Rewrite the code and the keys; the other deps stay."""
        others = [dep for dep in self.body["deps"] if not is_code(dep)]
        self.body["deps"][:] = [*self.code, *others]
        self.body.pop("params", None)
        if self.keys:
            tracked = [{self.params_file: sorted(self.keys)}]
            self.body.insert(list(self.body).index("deps") + 1, "params", tracked)


def declared(root: Path, path: Path, content: Any) -> Iterator[Declared]:
    """The stages of one `dvc.yaml`, from its content."""
    bodies = {name: entry.get("do", entry) for name, entry in content["stages"].items()}
    if path == VALIDATION:
        code, keys = code_of_stage(root, "benchmark"), params_of_benchmark()
        yield Declared(f"{path}:validate", bodies["validate"], BENCHMARK_PARAMS_FILE, code, keys)
        return
    for stage in STAGES:
        code, keys = code_of_stage(root, stage), params_of_stage(root, stage)
        yield Declared(stage, bodies[stage], PARAMS_FILE, code, keys)


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
            if file.is_file() and file.suffix in {".j2", ".html", ".css", ".js", ".json"}:
                yield file.relative_to(root)


def stale_deps(root: Path) -> dict[str, str]:
    """Stages whose deps or params in their `dvc.yaml` are not what their code needs, and how."""
    return {
        stage.name: ", ".join(faults)
        for path in PIPELINES
        for stage in declared(root, path, read_editable(root / path))
        if (faults := stage.faults())
    }


def write_deps(root: Path) -> None:
    """Rewrite the code and the params among each stage's deps in each `dvc.yaml`."""
    for path in PIPELINES:
        content = read_editable(root / path)
        for stage in declared(root, path, content):
            stage.mend()
        store.write_text(root / path, yaml_text(content))


def _tracked(body: Any, params_file: str = PARAMS_FILE) -> list[str]:
    return [key for entry in body.get("params", []) for key in entry[params_file]]


def params_of_benchmark() -> set[str]:
    """Keys of a benchmark's params file: all but `runtime`, for its result shows them all."""
    return set(BenchmarkParams.model_fields) - {"runtime"}


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
