"""Params of a benchmark: `params/benchmarks/<name>.yaml`, checked when read.

As for runs, nothing has a default: the file says all there is to know.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from tasks.params import Ratio, Runtime, Value, checked, params_file
from tasks.section import Count, Section, Seed, Text, by_key

BENCHMARKS = Path("params/benchmarks")
METHODS = (
    "gradient_dot",
    "cosine",
    "diagonal",
    "kfac",
    "ekfac",
    "lissa",
    "astra",
    "exact",
    "bm25",
    "tfidf",
    "hidden_cosine",
)


class Table(Section):
    """Rows of numbers, the last column the target: regression."""

    table: Text = Field(description="a .csv or .csv.gz file without header")
    limit: Count | None = Field(description="read this many rows; null: all")


class Digits(Section):
    """The 8 × 8 digits that scikit-learn ships."""

    digits: Literal["sklearn"]
    limit: Count | None


class Images(Section):
    """Images in one of the usual formats: MNIST's idx files, CIFAR-10's batches, PNG sprites."""

    images: Text = Field(description="the folder")
    format: Literal["idx", "cifar10", "sprites"]
    limit: Count | None = Field(description="read this many images; null: all")


class Story(Section):
    """Text, cut into windows of tokens by a tokenizer trained on it."""

    text: Text = Field(description="a .jsonl or .jsonl.gz file with a key `text`")
    vocabulary: Count = Field(description="of the byte-pair tokenizer")
    context: Annotated[int, Field(ge=2)] = Field(description="tokens of a sequence")
    limit: Count = Field(description="sequences, of all splits together")


Data = Annotated[
    Annotated[Table, Tag("<table>")]
    | Annotated[Digits, Tag("<digits>")]
    | Annotated[Images, Tag("<images>")]
    | Annotated[Story, Tag("<text>")],
    by_key(table="<table>", digits="<digits>", images="<images>", text="<text>"),
]


class Perceptron(Section):
    """Fully connected layers."""

    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = Field(
        description="of the hidden layers"
    )
    activation: Literal["tanh", "relu"]


class ResNet(Section):
    """The residual network of He et al. 2016 for small images: depth 6n + 2."""

    resnet: Annotated[int, Field(ge=8)] = Field(description="depth; 20 in the paper")


class Transformer(Section):
    """A GPT-2 of this size, without dropout."""

    blocks: Count
    width: Count
    heads: Count
    hidden: Count = Field(description="of the MLP")


Network = Annotated[
    Annotated[Perceptron, Tag("<perceptron>")]
    | Annotated[ResNet, Tag("<resnet>")]
    | Annotated[Transformer, Tag("<transformer>")],
    by_key(widths="<perceptron>", resnet="<resnet>", blocks="<transformer>"),
]


class Training(Section):
    """SGD; rate and L2 of a grid are chosen by the validation loss (Grosse et al. 2023, App. C)."""

    epochs: Count
    batch: Count
    momentum: float = Field(ge=0, lt=1)
    learning_rates: Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
    weight_decays: Annotated[tuple[float, ...], Field(strict=False, min_length=1)]


class TrainingLength(Section):
    """λ = 1 / (η K) of K steps at the effective rate η = rate / (1 − momentum), in every layer.

    The proximal term then lets θ go as far as gradient descent of that length would (Bae et al.
    2024; the choice of Wang et al. 2025). Known before any influence is computed.
    """

    training: Literal[True]


BenchmarkDamping = Annotated[
    Annotated[Ratio, Tag("<ratio>")]
    | Annotated[Value, Tag("<value>")]
    | Annotated[TrainingLength, Tag("<training>")],
    by_key(ratio="<ratio>", value="<value>", training="<training>"),
]


class Truth(Section):
    """The proximal Bregman response: which training examples and how exactly."""

    examples: Count = Field(description="training examples z, drawn at random")
    queries: Count = Field(description="test examples, drawn at random")
    epsilons: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = Field(
        description="weights of z, in copies (times 1/N); the first is the one compared with"
    )
    checked: Count = Field(description="examples that are solved at the other epsilons too")
    tolerance: float = Field(gt=0, description="relative residual at which a solve has converged")
    max_evaluations: Count = Field(description="gradients a solve may take")
    sketch: Count = Field(description="columns of the Nyström preconditioner")


class Estimators(Section):
    """What is held against the truth."""

    draws: Count = Field(
        description="labels sampled for each position when the curvature is fitted"
    )
    lissa_depths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    lissa_batch: Count
    astra_iterations: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    astra_batch: Count
    damping_ratios: Annotated[tuple[float, ...], Field(strict=False)]
    ranks: Annotated[tuple[Count, ...], Field(strict=False)]
    splits: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        description="O, blocks of A and S"
    )
    fit_sizes: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        description="examples that the curvature is fitted on"
    )


class Retraining(Section):
    """Linear datamodeling score: retraining on random halves."""

    subsets: Count
    seeds: Count = Field(description="trainings of each subset")
    share: float = Field(gt=0, lt=1, description="of the training set in a subset")
    epochs: Count
    at_once: Count = Field(description="models trained side by side")


class Mislabelled(Section):
    """Labels that are made wrong on purpose, to be found by self-influence."""

    share: float = Field(gt=0, lt=1)


class FineTuning(Section):
    """A few steps on one training sequence, watching f of the queries."""

    examples: Count
    steps: Count
    learning_rate: float = Field(gt=0)


class BenchmarkParams(Section):
    """One benchmark."""

    title: Text
    data: Data
    network: Network
    training: Training
    layers: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    dtype: Literal["float32", "float64"]
    damping: BenchmarkDamping
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        description="one model, split, and draw of queries each"
    )
    truth: Truth
    estimators: Estimators
    retraining: Retraining | None
    mislabelled: Mislabelled | None
    fine_tuning: FineTuning | None
    runtime: Runtime

    @model_validator(mode="after")
    def _network_fits_data(self) -> "BenchmarkParams":
        text, transformer = isinstance(self.data, Story), isinstance(self.network, Transformer)
        if text != transformer:
            raise ValueError("text needs a transformer (network.blocks), and nothing else does")
        if isinstance(self.network, ResNet) and not isinstance(self.data, Images):
            raise ValueError("network.resnet needs data.images")
        return self


def benchmark_file(name: str) -> Path:
    """Where the params of a benchmark stand, relative to the project's root."""
    return BENCHMARKS / f"{name}.yaml"


def is_benchmark(root: Path, name: str) -> bool:
    """Whether there is a benchmark of this name; the name may come from outside.

    Raises:
        ValueError: if there is a run of that name too: their artefacts would have one place.
    """
    if name not in benchmark_names(root):
        return False
    if (root / params_file(name)).exists():
        raise ValueError(
            f"{params_file(name)} and {benchmark_file(name)}: a run and a benchmark cannot have "
            "the same name; rename one of the files"
        )
    return True


def benchmark_names(root: Path) -> list[str]:
    """The benchmarks that have a params file."""
    return sorted(path.stem for path in (root / BENCHMARKS).glob("*.yaml"))


def load_benchmark(root: Path, name: str) -> BenchmarkParams:
    """The checked params of a benchmark.

    Raises:
        ValueError: if there is none of this name, or the file is wrong, a line for each fault.
    """
    if not is_benchmark(root, name):
        raise ValueError(
            f"there is no {benchmark_file(name)}; take {' or '.join(benchmark_names(root))}"
        )
    return checked(root, benchmark_file(name), BenchmarkParams)
