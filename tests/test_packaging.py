"""The checkout as a package: what it declares, what is imported, and that it names no machine."""

import re
import socket
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_architecture import DOORS, PACKAGES

DISTRIBUTION = {  # where a dependency has another name than its import
    "ruamel": "ruamel-yaml",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
}
WITH_AN_EXTRA = {"distributed", "ray"}  # they come with prefect-dask and prefect-ray
NOT_IMPORTED = {"fastapi"}  # declared only to hold a version down; pyproject.toml says why

# Paths of one machine and addresses of package servers: neither belongs into a checkout.
OF_ONE_MACHINE = re.compile(
    r"/(root|home|Users)/[.\w]"
    r"|(?<![\w.*}/-])/(work|opt|mnt|srv)/\w"
    r"|file:///[a-z]"
    r"|\b(pypi|pythonhosted|download\.pytorch|anaconda|npmjs)\.(org|com)\b"
    r"|--(find-links|index-url|extra-index-url)\b"
)
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".j2", ".css", ".js", ".lock", ""}


def machine_paths(text: str) -> list[str]:
    return [line for line in text.splitlines() if OF_ONE_MACHINE.search(line)]


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[._-]+", "-", name[0]).lower()


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def checked_in(root: Path) -> list[Path]:
    """What git holds or would add: ignored files are nobody else's business."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of files to look through")
    paths = (root / name for name in listing.stdout.split("\0") if name)
    return sorted({path for path in paths if path.is_file()})


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imported_packages_are_this_checkout(package: str, root: Path):
    """`tasks` and `flows` are common names: another one first on the path would run instead."""
    if not (root / package / "__init__.py").exists():
        pytest.skip(f"{package}/ is not written yet")
    assert Path(str(import_module(package).__file__)) == root / package / "__init__.py"


def test_every_package_folder_is_listed(project: dict, root: Path):
    folders = [p.parent for package in PACKAGES for p in (root / package).rglob("__init__.py")]
    found = {folder.relative_to(root).as_posix().replace("/", ".") for folder in folders}
    assert found <= set(project["tool"]["setuptools"]["packages"])


def test_dependencies_are_the_tools_with_a_door(project: dict):
    extras = project["project"]["optional-dependencies"]
    requirements = [*project["project"]["dependencies"]]
    requirements += [each for name in ("workflow", "dask", "ray", "peft") for each in extras[name]]
    declared = {normalised(requirement) for requirement in requirements}
    doors = {normalised(DISTRIBUTION.get(tool, tool)) for tool in set(DOORS) - WITH_AN_EXTRA}
    assert declared == doors | NOT_IMPORTED


def test_the_mathematics_is_installed_without_the_workflow(project: dict):
    declared = {normalised(each) for each in project["project"]["dependencies"]}
    assert declared == {"torch", "einops", "jaxtyping"}


def test_every_dependency_says_why(root: Path):
    text = (root / "pyproject.toml").read_text("utf-8")
    lists = re.findall(
        r"^(?:dependencies|workflow|dask|ray|s3|gs|peers|dev) = \[ *(?:#.*?)?\n(.*?)^\]",
        text,
        re.MULTILINE | re.DOTALL,
    )
    lines = [line for block in lists for line in block.splitlines() if line.strip().startswith('"')]
    assert len(lists) == 8
    assert [line for line in lines if not re.search(r"#\s*\S{2,}", line)] == []


def test_constraints_are_plain_versions_of_every_dependency(project: dict, root: Path):
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", pin)] == []
    extras = project["project"]["optional-dependencies"]
    tested = (*project["project"]["dependencies"], *extras["workflow"], *extras["dev"])
    wanted = {normalised(requirement) for requirement in tested}
    assert wanted <= {normalised(pin) for pin in pins}


def test_no_file_names_a_machine_or_a_package_server(checked_in: list[Path], root: Path):
    files = [
        path for path in checked_in if path.suffix in TEXT and root / "data" not in path.parents
    ]
    found = {
        path.relative_to(root).as_posix(): lines
        for path in files
        if (lines := machine_paths(path.read_text("utf-8", errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "/" + "home/ann/corpus",
        "see /" + "root/.cache",
        'open("/' + 'work/main")',
        "/" + "Users/ann",
        "https://pypi." + "org/simple",
        "--find-" + "links wheels",
        "file:/" + "//opt/simple",
    ],
)
def test_a_machine_path_is_seen(line: str):
    assert machine_paths(line) == [line]


@pytest.mark.parametrize(
    "line", [".work/fit-12/shard", "context.root/work/out", "{root}/work/x", "prefect work-pool"]
)
def test_what_only_looks_like_a_machine_path_passes(line: str):
    assert machine_paths(line) == []


def test_the_lock_is_constraints_txt(checked_in: list[Path]):
    locks = {"uv." + "lock", "poetry.lock", "Pipfile.lock"}  # they name package servers
    assert [path for path in checked_in if path.name in locks] == []


def test_embedded_files_stay_small(checked_in: list[Path], root: Path):
    megabytes = {p: p.stat().st_size / 1e6 for p in checked_in}
    assert sum(size for p, size in megabytes.items() if root / "data" in p.parents) < 10
    assert {p.name: size for p, size in megabytes.items() if size > 2} == {}


def test_the_tests_refuse_to_leave_this_machine():
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)  # an address kept for examples
