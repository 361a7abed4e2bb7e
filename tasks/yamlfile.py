"""YAML 1.2 files: read as plain values, or changed with their comments kept."""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError


def read_yaml(path: Path, shown: Path) -> Any:
    """Plain values; `shown` is the file's name in error messages.

    Raises:
        ValueError: if it does not exist, or is not YAML (with the line), or repeats a key.
    """
    if not path.is_file():
        raise ValueError(f"{shown} does not exist in {path.parents[len(shown.parts) - 1]}")
    try:
        return YAML(typ="safe", pure=True).load(path)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{shown}{line} is not YAML: {error.problem}; correct it") from error
    except Exception as error:  # of dates that are none, of bytes that are no text, of depth
        problem = " ".join(str(error).split())
        raise ValueError(f"{shown} is not YAML: {problem}; correct it") from error


def read_editable(path: Path) -> Any:
    """A file with its comments, to be changed and written by `yaml_text`."""
    return _editor().load(path)


def yaml_text(content: Any) -> str:
    """YAML with the comments and order that `read_editable` found."""
    stream = StringIO()
    _editor().dump(content, stream)
    return stream.getvalue()


def plain(content: Any) -> Any:
    """What `read_editable` found, without the comments: dicts, lists and scalars."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [plain(value) for value in content]
    if isinstance(content, bool) or content is None:
        return content
    for kind in (int, float, str):  # ruamel's scalars remember how they were written
        if isinstance(content, kind):
            return kind(content)
    return content


def _editor() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _null)
    return yaml


def _null(representer: Any, _value: None) -> Any:
    """`null` written out: what is left empty looks forgotten."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
