"""A run's model with its attributed layers, and batches of its sequences, in a worker thread."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from influence.experts import separate_experts
from influence.layers import Coverage, Layer, find_layers, share_inputs
from influence.passes import NonFiniteSequenceError
from influence.sequences import TokenBatch, batches_by_tokens
from tasks import store
from tasks.budget import Budget, find_budget, remembered
from tasks.checkpoints import ModelReference, read_reference
from tasks.models import model_for_thread
from tasks.precision import DTYPES, devices_of, resolve_device
from tasks.sequences import TokenStore
from tasks.workspace import StageContext

BUDGET = "tokens_per_batch.json"  # in the folder of a stage's partial results


@dataclass(frozen=True, slots=True)
class Attributed:
    """A model and the layers that scores speak for."""

    model: nn.Module
    layers: tuple[Layer, ...]
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class PassReference:
    """All a worker needs to run passes: references and plain values, never a tensor."""

    model: ModelReference
    tokenize: Path
    patterns: tuple[str, ...]
    device: str
    dtype_name: str
    tokens_per_batch: int

    @classmethod
    def of(cls, context: StageContext) -> "PassReference":
        """From the params and upstream artefacts of a stage."""
        runtime = context.params.runtime
        given, longest = runtime.tokens_per_batch, context.params.tokenize.context
        reference = cls(
            read_reference(context.artifact("train"), context.root),
            context.artifact("tokenize"),
            context.params.layers,
            resolve_device(runtime.device),
            runtime.dtype,
            longest if given == "auto" else given,
        )
        if given != "auto":
            return reference

        def find() -> Budget:
            there = reference.attributed()
            return find_budget(
                there.model, there.layers, longest, reference.device, runtime.workers
            )

        return replace(reference, tokens_per_batch=remembered(context.work / BUDGET, find))

    @property
    def input_device(self) -> str:
        """Where batches go."""
        return devices_of(self.device)[0]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def attributed(self) -> Attributed:
        """The model, with module objects of the calling thread's own: hooks hang on modules."""
        # Of the thread's own modules alone, over the weights that all threads share.
        model = separate_experts(model_for_thread(self.model, self.device, self.dtype))
        layers, coverage = find_layers(model, self.patterns)
        probe = torch.zeros(1, 2, dtype=torch.int64, device=self.input_device)
        return Attributed(model, share_inputs(model, layers, probe), coverage)

    def batches(
        self, rows: Sequence[int], tick: Callable[[int], None] | None = None
    ) -> Iterator[TokenBatch]:
        """The sequences of these rows on the device, longest first, within the token budget.

        `tick` is told of each batch's sequences when the next batch is asked for.
        """
        for batch, _ in self.batches_with_rows(rows, tick):
            yield batch

    def batches_with_rows(
        self, rows: Sequence[int], tick: Callable[[int], None] | None = None
    ) -> Iterator[tuple[TokenBatch, list[int]]]:
        """Each batch with the rows that it holds, in its order."""
        tokens, device = TokenStore.open(self.tokenize), self.input_device
        lengths = [tokens.lengths[row] for row in rows]
        for group in batches_by_tokens(lengths, self.tokens_per_batch):
            chosen = [rows[place] for place in group]
            yield tokens.batch(chosen).to(device), chosen
            if tick is not None:
                tick(len(chosen))

    def sequence_name(self, key: int) -> str:
        """The sequence with this key, as people know it."""
        table = store.read_table(self.tokenize / "sequences.parquet", ["key", "sequence"])
        names = dict(zip(table["key"].to_pylist(), table["sequence"].to_pylist(), strict=True))
        return names[key]

    @contextmanager
    def passes(self) -> Iterator[Attributed]:
        """The model for passes over the corpus; an error names the sequence that it met first.

        Raises:
            ValueError: naming layer and sequence, if an activation is NaN or infinite.
        """
        try:
            yield self.attributed()
        except NonFiniteSequenceError as error:
            name = self.sequence_name(error.sequence_id)
            raise ValueError(
                f"the activations or gradients at layer {error.layer!r} are NaN or infinite, "
                f"first in sequence {name!r}; check the weights of {self.model.path}, or run the "
                "pass in float32 (runtime.dtype)"
            ) from error
