"""`params/active.yaml`: which runs `dvc.yaml` spells out, and the input files that DVC watches.

DVC cannot look into `params/<run>.yaml` for the paths of a stage's inputs, so they are told twice:
`activate` writes them, and `check_active` refuses to start a stage where the two disagree.
"""

from pathlib import Path

from tasks import store
from tasks.params import (
    ACTIVE,
    LocalCheckpoint,
    RunParams,
    Scratch,
    Section,
    Text,
    checked,
    load_params,
    params_file,
)
from tasks.yamlfile import read_editable, yaml_text


class RunPaths(Section):
    """The input files of one run: an entry of `params/active.yaml`."""

    model: Text
    corpus: Text
    queries: Text


class Active(Section):
    """All of `params/active.yaml`."""

    runs: dict[str, RunPaths]


def load_active(root: Path) -> dict[str, RunPaths]:
    """The runs that `dvc.yaml` spells out, by name."""
    return checked(root, ACTIVE, Active).runs


def run_paths(params: RunParams) -> RunPaths:
    """The entry of a run in `params/active.yaml`.

    A model to train, or from the hub, is no file here: its stage then watches the corpus.
    """
    model = checkpoint_path(params) or params.corpus.path
    return RunPaths(model=model, corpus=params.corpus.path, queries=params.query.path)


def checkpoint_path(params: RunParams) -> str | None:
    """The folder of the run's checkpoint; None if it is trained, or comes from the hub."""
    if isinstance(params.train, Scratch):
        return None
    checkpoint = params.train.checkpoint
    return checkpoint.path if isinstance(checkpoint, LocalCheckpoint) else None


def check_active(root: Path, run: str, params: RunParams) -> None:
    """That `params/active.yaml` says of `run` what its params file says.

    Raises:
        ValueError: with the command that repairs it.
    """
    told, wanted = load_active(root).get(run), run_paths(params)
    repair = f"run `python -m flows activate {run}`"
    if told is None:
        raise ValueError(
            f"{ACTIVE}: run {run!r} is not there, so DVC has no stages for it; {repair}"
        )
    for key, value in wanted.model_dump().items():
        given = getattr(told, key)
        if given != value:
            raise ValueError(
                f"{ACTIVE}: `runs.{run}.{key}`: given {given!r}, but {params_file(run)} has "
                f"{value!r}; {repair}"
            )


def check_inputs(root: Path, run: str, params: RunParams) -> None:
    """That the files which the params name exist.

    Raises:
        ValueError: naming the key, the path and what should be there.
    """
    places = {"corpus.path": params.corpus.path, "query.path": params.query.path}
    checkpoint = checkpoint_path(params)
    if checkpoint is not None:
        places["train.checkpoint.path"] = checkpoint
    for key, path in places.items():
        if not (root / path).exists():
            raise ValueError(
                f"{params_file(run)}: `{key}`: given {path!r}, but {root / path} does not exist; "
                "correct the path (it starts at the project's root) or put the file there"
            )


def activate(root: Path, run: str) -> bool:
    """Write a run's entry into `params/active.yaml`; whether anything changed.

    The file's comments stay. The run's params file is checked first, with its inputs.
    """
    params = load_params(root, run)
    check_inputs(root, run, params)
    content = read_editable(root / ACTIVE)
    entry = run_paths(params).model_dump()
    if content["runs"].get(run) == entry:
        return False
    content["runs"][run] = entry
    store.write_text(root / ACTIVE, yaml_text(content))
    return True
