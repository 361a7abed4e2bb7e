"""The only door for params: `params/<run>.yaml`, one complete file a run, checked when read.

A section of the file is a class here, and a key a field; nothing has a default, so that the file
says all there is to know. Where a value has several kinds, its key is the tag: `damping` is
`{ratio: 0.1}` or `{value: 1.0e-3}`, never both.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from tasks.complaints import complaints
from tasks.yamlfile import read_yaml

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
ACTIVE = Path("params/active.yaml")
MAX_SHARDS = 50  # more task runs a stage make Prefect's sqlite database stall

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, strict (no "32" for 32), and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _by_key(**tags: str) -> Discriminator:
    """Choose the class of a union by which of the keys `tags` is there."""

    def tag(given: Any) -> str | None:
        keys = given if isinstance(given, dict) else getattr(given, "__dict__", {})
        return next((tags[key] for key in tags if key in keys), None)

    return Discriminator(tag, custom_error_type="kind", custom_error_message=" or ".join(tags))


class LocalCheckpoint(Section):
    """A Hugging Face checkpoint in a folder."""

    path: Text = Field(description="folder with config.json, model.safetensors, tokenizer.json")


class HubCheckpoint(Section):
    """A Hugging Face checkpoint from the hub, at one revision."""

    hub: Text = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="organisation/name")
    revision: Text = Field(
        pattern=r"^[0-9a-f]{40}$", description="the full sha of a commit: names like main move"
    )


class Checkpoint(Section):
    """A model that exists."""

    checkpoint: Annotated[
        Annotated[LocalCheckpoint, Tag("<path>")] | Annotated[HubCheckpoint, Tag("<hub>")],
        _by_key(path="<path>", hub="<hub>"),
    ]


class Architecture(Section):
    """A small model and how to train it from scratch on the run's corpus."""

    architecture: Literal["gpt2", "llama"]
    width: Count = Field(description="width of the residual stream; a multiple of heads")
    layers: Count
    heads: Count
    vocabulary: int = Field(ge=260, description="size of the byte-level BPE vocabulary")
    context: int = Field(ge=2, description="tokens")
    steps: Count
    batch: Count = Field(description="sequences a step")
    learning_rate: float = Field(gt=0, le=1)
    seed: Seed

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Architecture":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} does not split into {self.heads} heads of an even size; "
                f"take a width that is a multiple of {2 * self.heads}"
            )
        return self


class Scratch(Section):
    """A model to train."""

    scratch: Architecture


class Corpus(Section):
    """Lines of JSON, one document each."""

    path: Text = Field(description="a .jsonl or .jsonl.gz file, or a folder of them")
    text: Text = Field(description="the key of the text in a line")
    id: Text | None = Field(description="the key of the document's id; null: file:line")
    limit: Count | None = Field(description="read this many documents; null: all")


class Tokenize(Section):
    """Documents to sequences."""

    mode: Literal["document", "pack"]
    context: int = Field(ge=2, description="tokens of a sequence, at most")
    bos: bool = Field(description="begin each document with the tokenizer's bos")
    eos: bool = Field(description="end each document with the tokenizer's eos")


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

    ratio: float = Field(gt=0, allow_inf_nan=False)


class Value(Section):
    """The same λ in every layer."""

    value: float = Field(gt=0, allow_inf_nan=False)


Damping = Annotated[
    Annotated[Ratio, Tag("<ratio>")] | Annotated[Value, Tag("<value>")],
    _by_key(ratio="<ratio>", value="<value>"),
]


class Queries(Section):
    """The measurements, and how their gradients are prepared."""

    path: Text = Field(description="a .jsonl file of queries")
    damping: Damping
    rank: Count | None = Field(description="rank of a prepared query gradient; null: full")


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

    device: Literal["auto", "cpu", "cuda"]
    runner: Literal["threads", "dask", "ray"]
    workers: Count
    tokens_per_batch: Count
    shards: int = Field(ge=1, le=MAX_SHARDS, description="parts of a stage's work")
    dtype: Literal["float32", "float64", "bfloat16"]


class RunParams(Section):
    """One run."""

    train: Annotated[
        Annotated[Checkpoint, Tag("<checkpoint>")] | Annotated[Scratch, Tag("<scratch>")],
        _by_key(checkpoint="<checkpoint>", scratch="<scratch>"),
    ]
    corpus: Corpus
    tokenize: Tokenize
    layers: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    filter: Filter
    factors: Fit
    correct: Fit
    query: Queries
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
    if not RUN_NAME.fullmatch(run):
        raise ValueError(
            f"run name {run!r}: wanted lower-case letters, digits, - and _, a letter or digit first"
        )
    file = params_file(run)
    if not (root / file).is_file():
        names = sorted(p.stem for p in (root / "params").glob("*.yaml") if p.name != ACTIVE.name)
        raise ValueError(
            f"there is no {file} for run {run!r}; write one, or take {' or '.join(names)}"
        )
    return checked(root, file, RunParams)


def params_file(run: str) -> Path:
    """Where the params of a run stand, relative to the project's root."""
    return Path("params") / f"{run}.yaml"


def checked(root: Path, file: Path, model: type[Model]) -> Model:
    """The file as a `model`.

    Raises:
        ValueError: if it is missing, not YAML, or not such a model.
    """
    given = read_yaml(root / file, shown=file)
    if not isinstance(given, dict):
        raise ValueError(
            f"{file}: given {type(given).__name__}, wanted keys ({', '.join(model.model_fields)})"
        )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ValueError(complaints(file, model, error)) from error
