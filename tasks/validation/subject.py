"""One seed of a benchmark: its data, its trained model, and which examples are compared."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from influence.damping import AbsoluteDamping, RelativeDamping
from influence.examples import Batch
from influence.layers import Layer, find_layers
from influence.validation.ggn import GaussNewton, outputs_at
from influence.validation.layout import Layout
from tasks import store
from tasks.damping import damping_rule
from tasks.precision import DTYPES
from tasks.validation.context import BenchmarkContext
from tasks.validation.datasets import Splits, load_data, random_generator
from tasks.validation.networks import build
from tasks.validation.settings import TrainingLength

MEMORY = 2**29  # bytes that vectors or models side by side may take


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model θˢ and the examples it is asked about.

    Args:
        model: in evaluation mode.
        layers: the attributed layers.
        splits: all data.
        queries: the test examples whose f is measured.
        places: of the training examples z that have a ground truth, in `splits.train`.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    splits: Splits
    queries: Batch
    places: Int[Tensor, " z"]

    @property
    def train(self) -> Batch:
        """All N training examples."""
        return self.splits.train

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.train.ids)

    @property
    def layout(self) -> Layout:
        """Of the attributed parameters."""
        return Layout.of(self.layers)

    @property
    def examples_at_once(self) -> int:
        """Of one pass: more would not stay in the processor's caches."""
        return 32 if self.splits.context else 1024

    @property
    def side_by_side(self) -> int:
        """How many vectors, or copies of the model, fit into memory together."""
        like = self.layout.current()
        rows = self.train.inputs[0].numel() if self.splits.context else self._positions()
        widths = sum(layer.d_in + layer.d_out for layer in self.layers) + self.splits.num_outputs
        examples = min(self.num_examples, self.examples_at_once)
        one = 4 * examples * rows * widths * like.element_size()
        return max(1, min(64, MEMORY // max(one, 1)))

    def _positions(self) -> int:
        """Of an image under convolutions, its pixels; 1 for other examples."""
        shape = self.train.inputs.shape[1:]
        convolved = any(isinstance(layer.module, nn.Conv2d) for layer in self.layers)
        return shape[-1] * shape[-2] if convolved else 1

    @property
    def curvature(self) -> GaussNewton:
        """The exact G over all training examples."""
        return GaussNewton(
            self.model, self.layout, self.train, self.examples_at_once, self.side_by_side
        )

    def batches(self, places: Int[Tensor, " k"] | None = None) -> list[Batch]:
        """Training examples in batches, all of them or those at some places."""
        if places is None:
            places = torch.arange(self.num_examples)
        return [self.train.select(part) for part in places.split(128)]

    @torch.no_grad()
    def measure(self, offsets: Float[Tensor, "k p"]) -> Float[Tensor, "q k"]:
        """f of every query at θˢ + each offset, in nats."""
        here, layout = self.layout.current(), self.layout

        def losses(offset: Tensor) -> Tensor:
            outputs = outputs_at(self.model, self.queries, layout.parameters(here + offset))
            labels = self.queries.row_labels(self.queries.targets)
            return self.queries.likelihood.loss(outputs, labels)

        rows = vmap(losses)(offsets)
        total = rows.new_zeros(len(offsets), len(self.queries.ids))
        return -total.index_add(1, self.queries.owners, rows).T


def open_splits(context: BenchmarkContext, seed: int) -> Splits:
    """The data of a seed."""
    params = context.params
    return load_data(params.data, context.root, seed, DTYPES[params.dtype])


def open_subject(context: BenchmarkContext, index: int) -> Subject:
    """The seed at place `index` of `seeds`, with the model that `model_shard` trained."""
    params = context.params
    seed = params.seeds[index]
    splits = open_splits(context, seed)
    model = build(params.network, splits, DTYPES[params.dtype], seed)
    model.load_state_dict(store.read_tensors(model_file(context, index)))
    return subject_of(context, seed, splits, model.eval())


def subject_of(context: BenchmarkContext, seed: int, splits: Splits, model: nn.Module) -> Subject:
    """A model with the queries and training examples that its seed draws."""
    params = context.params
    layers, _ = find_layers(model, params.layers)
    return Subject(
        model,
        layers,
        splits,
        splits.test.select(_draw(len(splits.test.ids), params.truth.queries, seed, "queries")),
        _draw(len(splits.train.ids), params.truth.examples, seed, "examples"),
    )


def damping_of_seed(
    context: BenchmarkContext, index: int, train: Batch
) -> AbsoluteDamping | RelativeDamping:
    """The rule of the params; the length of training is that of the seed's chosen rate."""
    given, recipe = context.params.damping, context.params.training
    if not isinstance(given, TrainingLength):
        return damping_rule(given)
    rate = store.read_metadata(model_file(context, index))["chosen"]["learning_rate"]
    steps = recipe.epochs * math.ceil(len(train.ids) / recipe.batch)
    # The trainer divides by rows of outputs, and G sums over those of an example.
    rows_per_example = len(train.owners) / len(train.ids)
    effective = rate / (1 - recipe.momentum) / rows_per_example
    return AbsoluteDamping(1 / (effective * steps))


def _draw(num: int, wanted: int, seed: int, purpose: str) -> Int[Tensor, " k"]:
    generator = random_generator(seed, purpose)
    return torch.randperm(num, generator=generator)[:wanted].sort().values


def phase_file(context: BenchmarkContext, phase: str, index: int, total: int) -> Path:
    """Where the shard `index` of a phase is."""
    return context.work / f"{phase}-{index:05d}-of-{total:05d}.safetensors"


def model_file(context: BenchmarkContext, index: int) -> Path:
    """Where the trained model of a seed is."""
    return phase_file(context, "model", index, len(context.params.seeds))


def sketch_file(context: BenchmarkContext, index: int) -> Path:
    """Where the sketch of a seed's G is, with its dampings."""
    return phase_file(context, "sketch", index, len(context.params.seeds))
