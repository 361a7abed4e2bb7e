"""The rules of the house that a machine can hold: direction, doors, budgets, names, packaging.

A rule maps one source file to its complaints. Each rule is also shown code that breaks it, so a
rule that has gone blind fails here too.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("influence", "tasks", "flows")

# Which of our packages may import which: flows → tasks → influence.
DIRECTION = {
    "influence": {"influence"},
    "tasks": {"tasks", "influence"},
    "flows": {"flows", "tasks"},
}

# The mathematics sees tensors only: no files, no network, no clock, no global seed.
INFLUENCE_MAY_IMPORT = {
    "influence", "torch", "einops", "jaxtyping",
    "collections", "contextlib", "dataclasses", "fnmatch", "functools", "math",
    "operator", "typing", "weakref",
}  # fmt: skip

# Third-party tool → the files that may import it. What is not listed may be imported nowhere.
DOORS = {
    "torch": ("influence/*.py", "tasks/*.py"),
    "einops": ("influence/*.py", "tasks/*.py"),
    "jaxtyping": ("influence/*.py", "tasks/*.py"),
    "numpy": ("tasks/*.py",),
    "peft": ("tasks/adapters.py",),
    "transformers": ("tasks/models.py", "tasks/scratch.py", "tasks/train.py"),
    "tokenizers": ("tasks/models.py", "tasks/scratch.py"),
    "huggingface_hub": ("tasks/checkpoints.py",),
    "fsspec": ("tasks/faraway.py",),
    "accelerate": ("tasks/placement.py",),
    "safetensors": ("tasks/store.py",),
    "pyarrow": ("tasks/store.py", "tasks/rowgroups.py", "tasks/records.py"),
    "ruamel": ("tasks/yamlfile.py",),
    "pydantic": (
        "tasks/section.py",
        "tasks/origin.py",
        "tasks/material.py",
        "tasks/params.py",
        "tasks/complaints.py",
        "tasks/validation/settings.py",
        "flows/*.py",
    ),
    "filelock": ("tasks/workspace.py", "tasks/dvcstage.py", "flows/*.py"),
    "dvc": ("tasks/dvcstage.py",),
    "prefect": (
        "flows/*.py",
        "tasks/shardtasks.py",
        "tasks/runners.py",
        "tasks/workers.py",
        "tasks/progressbar.py",
    ),
    "distributed": ("tasks/runners.py", "tasks/workers.py"),
    "prefect_dask": ("tasks/runners.py", "tasks/workers.py"),
    "prefect_ray": ("tasks/runners.py", "tasks/workers.py"),
    "ray": ("tasks/runners.py", "tasks/workers.py"),
    "mlflow": ("tasks/tracking.py", "tasks/registry.py"),
    "psutil": (
        "tasks/workers.py",
        "tasks/budget.py",
        "tasks/planning/hardware.py",
        "tasks/planning/measured.py",
        "tasks/planning/startup.py",
        "flows/*.py",
    ),
    "matplotlib": ("tasks/figures.py", "tasks/validation/pictures.py"),
    "sklearn": ("tasks/validation/datasets.py",),
    "PIL": ("tasks/validation/images.py",),
    "bm25s": ("tasks/baselines.py", "tasks/validation/similarity.py"),
    "datasketch": ("tasks/duplicates.py",),
    "jinja2": ("tasks/report.py", "tasks/page/*.py"),
    "markupsafe": ("tasks/report.py", "tasks/page/*.py"),
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
EMPTY_NAMES = re.compile(r"utils?|managers?|handlers?|helpers?|common|misc")


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file; `path` is relative to the root, with forward slashes."""

    path: str
    text: str

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text, self.path))


def imported(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, inside functions and by import_module("…") too."""
    for node in source.nodes():
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, source.package if node.level else node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            )
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def tops(source: Source) -> Iterator[tuple[int, str]]:
    return ((line, module.split(".")[0]) for line, module in imported(source))


def dependencies_run_one_way(source: Source) -> list[str]:
    allowed = DIRECTION[source.package]
    return [
        f"{source.path}:{line} imports {top}; flows → tasks → influence"
        for line, top in tops(source)
        if top in (*PACKAGES, "tests", "benchmarks") and top not in allowed
    ]


def influence_imports_only_mathematics(source: Source) -> list[str]:
    if source.package != "influence":
        return []
    return [
        f"{source.path}:{line} imports {top}, which the mathematics does not need"
        for line, top in tops(source)
        if top not in INFLUENCE_MAY_IMPORT
    ]


def influence_has_no_ambient_state(source: Source) -> list[str]:
    ambient = re.compile(r"open|print|input|torch\.(manual_seed|seed|save|load|set_\w+|use_\w+)")
    if source.package != "influence":
        return []
    return [
        f"{source.path}:{node.lineno} calls {ast.unparse(node.func)}: that belongs in tasks/"
        for node in source.nodes()
        if isinstance(node, ast.Call) and ambient.fullmatch(ast.unparse(node.func))
    ]


def only_the_eigenbasis_transposes_a_Q(source: Source) -> list[str]:
    if source.path == "influence/eigenbasis.py":
        return []
    return [
        f"{source.path}:{node.lineno} transposes {ast.unparse(node.value)}: use EigenBasis"
        for node in source.nodes()
        if isinstance(node, ast.Attribute)
        and node.attr in ("T", "mT", "H", "mH", "t", "transpose", "permute")
        and re.search(r"\bQ_[AS]$", ast.unparse(node.value))
    ]


def third_party_comes_in_by_its_door(source: Source) -> list[str]:
    complaints = []
    for line, top in tops(source):
        if top in sys.stdlib_module_names or top in PACKAGES:
            continue
        if not any(fnmatch(source.path, door) for door in DOORS.get(top, ())):
            doors = ", ".join(DOORS.get(top, ())) or "none: add it to DOORS and to pyproject.toml"
            complaints.append(f"{source.path}:{line} imports {top}; its door is {doors}")
    return complaints


def no_postponed_annotations_beside_prefect(source: Source) -> list[str]:
    """Prefect resolves a flow's parameter types at run time, and fails on postponed ones."""
    modules = {module for _, module in imported(source)}
    if "__future__" in modules and any(module.split(".")[0] == "prefect" for module in modules):
        return [f"{source.path} imports __future__.annotations beside prefect"]
    return []


def no_tensor_crosses_a_task(source: Source) -> list[str]:
    complaints = []
    for node in source.nodes():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        signature = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
        if re.search(r"\b(task|flow)\b", decorators) and "Tensor" in signature:
            complaints.append(f"{source.path}:{node.lineno} {node.name} passes a tensor to Prefect")
    return complaints


def package_files_hold_only_a_docstring(source: Source) -> list[str]:
    """They are dependencies of every stage: an import in one would make all stages depend on it."""
    if not source.path.endswith("/__init__.py"):
        return []
    body = ast.parse(source.text).body
    only_docstring = len(body) == 1 and ast.get_docstring(ast.parse(source.text)) is not None
    return [] if only_docstring else [f"{source.path} must hold a docstring and nothing else"]


def files_stay_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{source.path} has {lines} lines, at most {MAX_FILE_LINES}: split it by object"] * (
        lines > MAX_FILE_LINES
    )


def functions_stay_short(source: Source) -> list[str]:
    return [
        f"{source.path}:{node.lineno} {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
        for node in source.nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def files_are_named_for_what_they_hold(source: Source) -> list[str]:
    names = source.path.removesuffix(".py").split("/")
    return [
        f"{source.path}: {name!r} says nothing" for name in names if EMPTY_NAMES.fullmatch(name)
    ]


Rule = Callable[[Source], list[str]]
long_function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES

# Each rule with code that breaks it: (path, text).
RULES: dict[Rule, list[tuple[str, str]]] = {
    dependencies_run_one_way: [
        ("influence/a.py", "from tasks.store import digest"),
        ("influence/a.py", "def f():\n    import flows.stage"),
        ("tasks/a.py", "from flows import stage"),
        ("flows/a.py", "from influence.scores import influence"),
        ("tasks/a.py", "import tests"),
    ],
    influence_imports_only_mathematics: [
        ("influence/a.py", f"import {module}")
        for module in (
            "pathlib",
            "os",
            "random",
            "time",
            "datetime",
            "numpy",
            "yaml",
            "transformers",
        )
    ]
    + [("influence/a.py", "from os.path import join"), ("influence/a.py", "__import__('random')")],
    influence_has_no_ambient_state: [
        ("influence/a.py", "import torch\ntorch.manual_seed(0)"),
        ("influence/a.py", "import torch\ntorch.set_default_dtype(torch.float64)"),
        ("influence/a.py", "text = open('a').read()"),
    ],
    only_the_eigenbasis_transposes_a_Q: [
        ("influence/a.py", "def f(basis, V):\n    return basis.Q_S.mT @ V"),
        ("tasks/a.py", "def f(Q_A):\n    return Q_A.transpose(0, 1)"),
    ],
    third_party_comes_in_by_its_door: [
        ("tasks/a.py", "import requests"),
        ("tasks/a.py", "from importlib import import_module\nimport_module('mlflow.tracking')"),
        *(("tests/elsewhere.py", f"from {tool}.part import thing") for tool in DOORS),
        *(("tests/elsewhere.py", f"def f():\n    import {tool} as t") for tool in DOORS),
        *(("flows/a.py", f"import {tool}") for tool in ("torch", "numpy", "einops", "pyarrow")),
    ],
    no_postponed_annotations_beside_prefect: [
        ("flows/a.py", "from __future__ import annotations\nfrom prefect import flow"),
    ],
    no_tensor_crosses_a_task: [
        ("tasks/a.py", "@task(persist_result=True)\ndef f(x: Tensor) -> str: ..."),
        ("flows/a.py", "@prefect.flow\nasync def f(x: int) -> Float[Tensor, 'n']: ..."),
    ],
    package_files_hold_only_a_docstring: [
        ("tasks/__init__.py", '"""Stages."""\nfrom tasks import store'),
        ("tasks/page/__init__.py", ""),
    ],
    files_stay_short: [("tasks/a.py", "x = 1\n" * (MAX_FILE_LINES + 1))],
    functions_stay_short: [("tasks/a.py", long_function)],
    files_are_named_for_what_they_hold: [("tasks/utils.py", ""), ("tasks/common/a.py", "")],
}
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


def sources() -> list[Source]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text("utf-8")) for p in paths]


@by_rule
def test_the_house_keeps_its_rules(rule: Rule):
    assert "\n".join(complaint for source in sources() for complaint in rule(source)) == ""


@by_rule
def test_the_rules_see_what_breaks_them(rule: Rule):
    assert [bad for bad in RULES[rule] if not rule(Source(*bad))] == []


def test_the_rules_let_good_code_pass():
    good = [
        Source(
            "influence/a.py", "import math\nfrom torch import Tensor\nfrom influence.b import c"
        ),
        Source("tasks/store.py", "from pathlib import Path\nimport pyarrow.parquet as pq"),
        Source("tasks/page/__init__.py", '"""The page."""\n'),
        Source("flows/stage.py", "from prefect import flow\nfrom tasks import factors\n"),
        Source("tasks/a.py", long_function.replace("    x = 1\n", "", 1)),
        Source("influence/eigenbasis.py", "def f(Q_S, V):\n    return Q_S.mT @ V"),
    ]
    assert [complaint for source in good for rule in RULES for complaint in rule(source)] == []


@pytest.mark.parametrize("tool", DOORS)
def test_a_tool_may_use_its_door(tool: str):
    for door in DOORS[tool]:
        source = Source(door.replace("*", "a"), f"import {tool}")
        assert third_party_comes_in_by_its_door(source) == []
