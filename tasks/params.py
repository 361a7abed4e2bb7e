"""The only door for params: `params/<run>.yaml`, one complete file a run, checked when read.

A section of the file is a class here, and a key a field; nothing has a default, so that the file
says all there is to know. Where a value has several kinds, its key is the tag: `damping` is
`{ratio: 0.1}` or `{value: 1.0e-3}`, never both.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from tasks.complaints import complaints
from tasks.material import Corpus, Tokenize
from tasks.origin import Checkpoint, FineTuned, Scratch
from tasks.section import Count, Positive, Section, Seed, Text, by_key
from tasks.yamlfile import read_yaml

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
ACTIVE = Path("params/active.yaml")
MAX_SHARDS = 50  # more task runs a stage make Prefect's sqlite database stall
ADDRESSES = {  # of a cluster's scheduler, by runner: pattern, and in words
    "dask": (r"(tcp|tls)://[^/\s]+:\d+", "tcp://host:8786"),
    "ray": (r"(ray://)?[^/:\s]+:\d+", "ray://host:10001 or host:6379"),
}

Model = TypeVar("Model", bound=BaseModel)


class Tfidf(Section):
    """Only the sequences nearest to a query by TF-IDF are scored."""

    method: Literal["tfidf"]
    terms: Literal["tokens", "words"] = Field(
        description="model tokens, as in the paper; words where tokens are pieces of words"
    )
    top: Count = Field(description="candidates a query")
    audit: int = Field(ge=0, description="rejected sequences scored too, to measure the recall")
    seed: Seed


class NoFilter(Section):
    """Every sequence is scored."""

    method: Literal["none"]


def _by_method(given: Any) -> str | None:
    method = given.get("method") if isinstance(given, dict) else getattr(given, "method", None)
    return {"tfidf": "<tfidf>", "none": "<none>"}.get(method) if isinstance(method, str) else None


Filter = Annotated[
    Annotated[Tfidf, Tag("<tfidf>")] | Annotated[NoFilter, Tag("<none>")],
    Discriminator(
        _by_method, custom_error_type="kind", custom_error_message="method: tfidf or method: none"
    ),
]


class Fit(Section):
    """Sequences that the curvature is measured on, drawn with a seed that the labels share."""

    sequences: Count
    seed: Seed


class Ratio(Section):
    """λ of a layer = ratio · the mean of its corrected eigenvalues."""

    ratio: Positive


class Value(Section):
    """The same λ in every layer."""

    value: Positive


Damping = Annotated[
    Annotated[Ratio, Tag("<ratio>")] | Annotated[Value, Tag("<value>")],
    by_key(ratio="<ratio>", value="<value>"),
]


class Queries(Section):
    """The measurements, and how their gradients are prepared."""

    path: Text = Field(description="a .jsonl file of queries")
    damping: Damping
    damping_grid: Annotated[tuple[Positive, ...], Field(strict=False)] = Field(
        description="further ratios λ ÷ mean Λ, scored in the same pass"
    )
    rank: Count | None = Field(description="rank of a prepared query gradient; null: full")

    @model_validator(mode="after")
    def _ratios_differ(self) -> "Queries":
        if len(set(self.damping_grid)) < len(self.damping_grid):
            raise ValueError(
                f"damping_grid {list(self.damping_grid)} names a ratio twice; once is enough"
            )
        return self


class Stream(Section):
    """What one pass over the candidates tells besides their scores."""

    self_influence: bool = Field(description="of each candidate, on its own log-probability")
    subspace: Count | None = Field(
        description="columns of a subspace that all queries share, for many queries; null: exact"
    )


class Score(Section):
    """How many sequences are scored again at full rank and told token by token."""

    top: Count = Field(description="sequences a query and sign")
    control: int = Field(ge=0, description="random candidates, to compare ranks with")
    seed: Seed


class Validate(Section):
    """What is measured about the result."""

    split_half: int = Field(ge=2, description="sequences in each half of the corpus")
    sample: int = Field(ge=0, description="sequences for the correlation of the halves' scores")
    seed: Seed


class Report(Section):
    """The page."""

    title: Text
    top: Count = Field(description="sequences shown a query and sign; at most score.top")


class Runtime(Section):
    """Where and how fast; no key here changes a result, and DVC watches none of them."""

    device: Literal["auto", "cpu", "cuda", "spread"] = Field(
        description="auto: cuda where there is one; spread: the model over all GPUs of a worker"
    )
    runner: Literal["threads", "dask", "ray"]
    address: Text | None = Field(description="of a running cluster; null: workers here")
    workers: Count = Field(description="shards at work at once on a machine")
    gpus_per_task: float = Field(ge=0, description="GPUs that Ray gives to a shard; may be 0.5")
    tokens_per_batch: Count | Literal["auto"] = Field(
        description="of one pass; auto: as many as the machine's memory and speed allow"
    )
    layer_memory: Positive | Literal["auto"]  # GiB of a worker, layergroups.py
    shards: int = Field(ge=1, le=MAX_SHARDS, description="parts of a stage's work")
    dtype: Literal["float32", "float64", "bfloat16"]

    @model_validator(mode="after")
    def _runner_can_do_it(self) -> "Runtime":
        if self.address is not None:
            self._check_address(self.address)
        if self.gpus_per_task and self.runner != "ray":
            raise ValueError(
                f"gpus_per_task {self.gpus_per_task:g} is for Ray, and runner is {self.runner}; "
                "set it to 0, or runner to ray"
            )
        if self.gpus_per_task > 1 and self.gpus_per_task % 1:
            raise ValueError(
                f"gpus_per_task {self.gpus_per_task:g}: above 1, Ray gives whole GPUs only; write "
                "a whole number"
            )
        needed = {"cpu": self.gpus_per_task == 0, "cuda": self.gpus_per_task > 0}
        needed["spread"] = self.gpus_per_task > 1
        if self.runner == "ray" and not needed.get(self.device):
            raise ValueError(
                f"with runner ray, device {self.device} and gpus_per_task {self.gpus_per_task:g} "
                "do not go together; write cpu and 0, cuda and the GPUs of a shard, or spread and "
                "2 or more"
            )
        return self

    def _check_address(self, address: str) -> None:
        wanted = ADDRESSES.get(self.runner)
        if wanted is None:
            raise ValueError(
                f"address {address!r} is for dask and ray, and runner is {self.runner}; "
                "set it to null, or name the runner"
            )
        if not re.fullmatch(wanted[0], address):
            raise ValueError(f"address {address!r}: wanted {wanted[1]} for runner {self.runner}")
        if self.device == "auto":
            raise ValueError(
                "device auto may be another on each machine of a cluster; write cpu, cuda or spread"
            )


class RunParams(Section):
    """One run."""

    train: Annotated[
        Annotated[Checkpoint, Tag("<checkpoint>")]
        | Annotated[FineTuned, Tag("<finetune>")]
        | Annotated[Scratch, Tag("<scratch>")],
        by_key(checkpoint="<checkpoint>", finetune="<finetune>", scratch="<scratch>"),
    ]
    corpus: Corpus
    tokenize: Tokenize
    layers: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    filter: Filter
    factors: Fit
    correct: Fit
    query: Queries
    stream: Stream
    score: Score
    validate_: Validate = Field(alias="validate")
    report: Report
    runtime: Runtime

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunParams":
        if isinstance(self.train, Scratch):
            context = self.train.scratch.context
            if self.tokenize.context > context:
                raise ValueError(
                    f"tokenize.context {self.tokenize.context} is longer than the model's "
                    f"train.scratch.context {context}; lower the one or raise the other"
                )
        if self.report.top > self.score.top:
            raise ValueError(
                f"report.top {self.report.top} is more than score.top {self.score.top}; "
                "lower the one or raise the other"
            )
        return self


def load_params(root: Path, run: str) -> RunParams:
    """The checked params of a run.

    Raises:
        ValueError: if the name or the file is wrong; one line for each fault, with the key.
    """
    file = run_file(run)
    if not (root / file).is_file():
        raise ValueError(
            f"there is no {file} for run {run!r}; write one, or take {' or '.join(run_names(root))}"
        )
    return checked(root, file, RunParams)


def params_file(run: str) -> Path:
    """Where the params of a run stand, relative to the project's root."""
    return Path("params") / f"{run}.yaml"


def run_file(run: str) -> Path:
    """`params_file` of a name that may come from outside: it cannot leave the folder.

    Raises:
        ValueError: if it is no name of a run.
    """
    if not RUN_NAME.fullmatch(run) or params_file(run) == ACTIVE:
        raise ValueError(
            f"run name {run!r}: wanted lower-case letters, digits, - and _, a letter or digit "
            f"first, and not {ACTIVE.stem!r}"
        )
    return params_file(run)


def run_names(root: Path) -> list[str]:
    """The runs that have a params file."""
    return sorted(p.stem for p in (root / "params").glob("*.yaml") if p.name != ACTIVE.name)


def checked(root: Path, file: Path, model: type[Model]) -> Model:
    """The file as a `model`.

    Raises:
        ValueError: if it is missing, not YAML, or not such a model.
    """
    return validated(read_yaml(root / file, shown=file), file, model)


def validated(given: Any, file: Path, model: type[Model]) -> Model:
    """Plain values as a `model`; `file` is named in error messages.

    Raises:
        ValueError: if they are not such a model.
    """
    if not isinstance(given, dict):
        raise ValueError(
            f"{file}: given {type(given).__name__}, wanted keys ({', '.join(model.model_fields)})"
        )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ValueError(complaints(file, model, error)) from error
