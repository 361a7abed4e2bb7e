"""A run that is planned: what is large about it, on a machine; and the form of a stage's costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from influence import costs
from influence.layers import Layer, layer_groups
from tasks.budget import fitting_tokens
from tasks.layergroups import SHARE
from tasks.params import RunParams, Tfidf
from tasks.planning.corpus import CorpusSize
from tasks.planning.hardware import Hardware
from tasks.planning.model import ModelSizes
from tasks.precision import DTYPES, dtype_at_rest

DOUBLE = 8  # bytes of a number of the sums that shards leave


@dataclass(frozen=True, slots=True)
class Sizes:
    """All that is large about a run but its params."""

    model: ModelSizes
    corpus: CorpusSize
    num_queries: int
    query_length: float
    bare: int
    """Bytes of a process that has imported what every stage needs."""
    base: int
    """And of one with a model."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's costs.

    Attributes:
        stage: its name.
        tokens: that passes go through; of `tokenize` and `filter`, that are read.
        sequences: in them.
        flop: floating-point operations.
        device: peak bytes where passes run; 0 for a stage without passes.
        host: peak bytes of the stage's process.
        disk: bytes of what it publishes.
        work: bytes of partial results, gone when it is done.
        shards: parts of its work.
        groups: of layers; the stage passes over its sequences once a group.
        again: of the operations, those of passes after that for the first group.
    """

    stage: str
    tokens: float = 0.0
    sequences: float = 0.0
    flop: float = 0.0
    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    work: float = 0.0
    shards: int = 1
    groups: int = 1
    again: float = 0.0


@dataclass(frozen=True, slots=True)
class Groups:
    """Layers that go through a stage together, group by group.

    Attributes:
        layers: of each group.
        held: bytes of the largest.
        backwards: a pass goes no further down than its group's lowest layer; of the passes for all
            groups together, in whole ones.
    """

    layers: tuple[tuple[Layer, ...], ...]
    held: int
    backwards: float

    @property
    def passes(self) -> tuple[int, float]:
        """Through the model to the loss, and back."""
        return len(self.layers), self.backwards


@dataclass(frozen=True, slots=True)
class Planned:
    """A run on a machine, ready to be asked about each of its stages."""

    params: RunParams
    sizes: Sizes
    hardware: Hardware

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.sizes.model.shape.layers

    @property
    def itemsize(self) -> int:
        """Bytes of a number of a pass."""
        return DTYPES[self.params.runtime.dtype].itemsize

    @property
    def at_rest(self) -> int:
        """Bytes of a number of what is kept of curvature."""
        return dtype_at_rest(self.params).itemsize

    @property
    def weights(self) -> int:
        """Bytes of the model."""
        return self.sizes.model.shape.num_parameters * self.itemsize

    @property
    def methods(self) -> int:
        """EK-FAC, gradient dot product, and each further damping."""
        return 2 + len(self.params.query.damping_grid)

    @property
    def length(self) -> float:
        """Tokens of a sequence, on average."""
        return self.sizes.corpus.length

    def columns(self, length: float, sequences: float = float("inf")) -> costs.Length:
        """Tokens of a sequence that a layer's part of a batch has room for.

        Of an expert, as many as the sequence with most tokens there sends (`influence.experts`), if
        each token chooses by chance: the largest of as many binomials as the batch has sequences.

        Args:
            length: tokens of a sequence.
            sequences: that there are, of which a batch may hold fewer.
        """
        shape = self.sizes.model.shape
        sequences = max(1.0, min(sequences, self.batch / length))
        normal = NormalDist().inv_cdf((sequences - 0.375) / (sequences + 0.25))  # Blom 1958

        def of(layer: Layer) -> float:
            share = shape.share(layer)
            most = share * length + normal * sqrt(share * (1 - share) * length)
            return min(length, max(1.0, most))

        return of

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        runtime, longest = self.params.runtime, self.params.tokenize.context
        if runtime.tokens_per_batch != "auto":
            return max(longest, runtime.tokens_per_batch)
        kind = "cpu" if self.hardware.device_memory is None else "cuda"
        each = max(1, int(self.sizes.model.held * self.itemsize))
        free = max(1, self.hardware.free - self.weights)
        return fitting_tokens(kind, free, runtime.workers, each, longest)

    @property
    def pass_bytes(self) -> float:
        """What one worker's batch holds."""
        model, on_gpu = self.sizes.model, self.hardware.device_memory is not None
        return self.batch * model.pass_bytes(self.itemsize) + model.block_bytes(on_gpu)

    @property
    def layer_memory(self) -> int:
        """Bytes that a worker keeps of layers."""
        runtime = self.params.runtime
        if runtime.layer_memory != "auto":
            return int(runtime.layer_memory * 2**30)
        return int(SHARE * max(1, self.hardware.free - self.weights) / runtime.workers)

    @property
    def num_candidates(self) -> int:
        """Sequences that are streamed: by TF-IDF, as if each query chose by itself."""
        total, settings = self.sizes.corpus.num_sequences, self.params.filter
        if not isinstance(settings, Tfidf):
            return total
        missed = max(0.0, 1 - settings.top / max(1, total)) ** self.sizes.num_queries
        return min(total, round(total * (1 - missed)) + settings.audit)

    def fitted(self, wanted: int) -> int:
        """Sequences of a fit, of which the corpus may have fewer."""
        return min(wanted, self.sizes.corpus.num_sequences)

    def shards(self, items: int) -> int:
        """Parts that so many items are split into."""
        return max(1, min(self.params.runtime.shards, items))

    def at_once(self, shards: int) -> int:
        """Shards at work together on this machine."""
        return min(self.params.runtime.workers, shards)

    def grouped(self, size: Callable[[Sequence[Layer]], int]) -> "Groups":
        """The groups of layers that go through a stage together."""
        places = {layer.name: at for at, layer in enumerate(self.layers)}
        groups = tuple(layer_groups(self.layers, size, self.layer_memory))
        lowest = [min(places[layer.name] for layer in group) for group in groups]
        above = (1 - (place + 1) / len(self.layers) for place in sorted(lowest)[1:])
        return Groups(groups, max(size(group) for group in groups), 1 + sum(above))

    def pass_flop(self, sequences: float, groups: "Groups | None" = None) -> float:
        """Of passes over so many sequences, for each group of layers."""
        shape, times = self.sizes.model.shape, groups.passes if groups else (1, 1)
        return sequences * self.length * costs.pass_flop(shape, self.length, *times)

    def passed(self, sequences: float, groups: "Groups", queries: float = 0) -> dict[str, float]:
        """Figures of a stage that passes over sequences, and queries, for each group of layers."""
        number, backwards = groups.passes
        shape, length = self.sizes.model.shape, self.sizes.query_length
        again = self.pass_flop(sequences, groups) - self.pass_flop(sequences)
        again += queries * length * costs.pass_flop(shape, length, number - 1, backwards - 1)
        return {"sequences": sequences * number, "groups": number, "again": again}

    def cost(self, stage: str, **figures: float) -> StageCost:
        """Of a stage that passes over sequences, if `sequences` is given."""
        sequences = figures.get("sequences", 0.0)
        return StageCost(stage, **({"tokens": sequences * self.length} | figures))  # pyright: ignore

    def memory(
        self, shards: int, each: float, once: float = 0.0, tokens: float | None = None
    ) -> dict[str, float]:
        """Peaks where passes run and on the host.

        Args:
            shards: of the stage.
            each: bytes that a worker holds beside the model and its batch.
            once: bytes on the host that all workers share.
            tokens: of all batches together, where these are few.
        """
        share = 1.0 if tokens is None else min(1.0, tokens / self.batch)
        workers = self.at_once(shards)
        processes = 1 if self.params.runtime.runner == "threads" else workers
        device = processes * self.weights + workers * (share * self.pass_bytes + each)
        base = processes * self.sizes.base + once
        if self.hardware.device_memory is None:
            return {"device": device, "host": base + device}
        return {"device": device, "host": base + processes * self.weights}  # loaded there first
