"""Changes to a params file from outside an editor: single keys, or a new run made from another.

The comments stay, and a file is written only if what it would say is valid as a whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import store
from tasks.params import RunParams, load_params, params_file, run_file, validated
from tasks.validation.settings import benchmark_file, is_benchmark
from tasks.yamlfile import plain, read_editable, yaml_text


def change_params(root: Path, run: str, changes: Mapping[str, Any]) -> list[str]:
    """Set keys of `params/<run>.yaml`; what was changed, as `key: old → new`.

    Args:
        root: the checkout.
        run: name of a run that exists.
        changes: values by dotted key, `{"query.damping": {"ratio": 0.1}}`.

    Raises:
        ValueError: if the file would not be valid; it is then as it was.
    """
    load_params(root, run)
    content = read_editable(root / params_file(run))
    told = _set_all(content, changes)
    if told:
        _write(root, run, content)
    return told


def new_run(root: Path, name: str, base: str, changes: Mapping[str, Any]) -> list[str]:
    """Write `params/<name>.yaml`: those of `base` with changes; what differs, `key: old → new`.

    Raises:
        ValueError: if that run exists, or its name or params would not be valid.
    """
    load_params(root, base)
    file = root / run_file(name)
    if file.exists():
        raise ValueError(
            f"{params_file(name)} exists already: choose {name!r} as the run to change it, or take "
            "another name for the new one"
        )
    if is_benchmark(root, name):
        raise ValueError(f"{name!r} is a benchmark ({benchmark_file(name)}); take another name")
    content = read_editable(root / params_file(base))
    told = _set_all(content, changes)
    content.yaml_set_start_comment(f"Run `{name}`, made from {params_file(base)}.")
    _write(root, name, content)
    return told


def _set_all(content: Any, changes: Mapping[str, Any]) -> list[str]:
    return [line for key, value in changes.items() if (line := _set(content, key, value))]


def _set(content: Any, key: str, value: Any) -> str:
    """Set one dotted key; `key: old → new`, or nothing if it had that value."""
    *outer, last = key.split(".")
    for name in outer:
        content = content[name]
    if last not in content:
        raise ValueError(
            f"`{key}` does not go with what `{'.'.join(outer)}` is here ({_shown(content)}); "
            "change that in the file"
        )
    old = content[last]
    if plain(old) == value:
        return ""
    told = f"{key}: {_shown(old)} → {_shown(value)}"
    if isinstance(old, dict) and isinstance(value, dict) and set(old) == set(value):
        old.update(value)  # keeps the comments inside
    else:
        content[last] = value
    return told


def _shown(value: Any) -> str:
    value = plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)


def _write(root: Path, run: str, content: Any) -> None:
    validated(plain(content), params_file(run), RunParams)
    store.write_text(root / params_file(run), yaml_text(content))
