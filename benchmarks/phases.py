"""The phases of the engine as calls that can be timed: this project's side."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.clock import MIB, Work
from influence.contraction import Prepared
from influence.damping import RelativeDamping
from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock
from influence.factors import Factors, fit_factors
from influence.layers import Layer, find_layers, share_inputs
from influence.lowrank import LowRank
from influence.queries import Method, Query, prepare_queries
from influence.selfinfluence import stream_self
from influence.sequences import TokenBatch, batches_by_tokens
from influence.spectrum import Spectrum, fit_spectra
from influence.streaming import Told, stream, stream_all
from influence.subspace import SharedSubspace
from tasks.eigens import write_eigens
from tasks.kronecker import write_factors
from tasks.spectra import write_spectra

RANK = 32
DAMPING = RelativeDamping(0.1)
QUERY_LENGTH = 128
UNIT_TOKENS = 2**12  # that the unit goes through, of a larger corpus
WAITING = 2  # GiB
SHARED = 256  # columns of the subspace that many queries share


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Args:
        shape: of the model.
        length: tokens of a sequence.
        num_sequences: candidates, and sequences of the fit.
        patterns: which layers.
        num_queries: of `QUERY_LENGTH` tokens or the sequences' length, whichever is less.
        tokens_per_batch: of a pass.
        made_up: eigenbases are rotations drawn at random, where only their size matters.
        waiting_gib: of gradients that wait to meet many queries.
    """

    shape: models.Shape = models.SHAPES["M"]
    length: int = 512
    num_sequences: int = 8
    patterns: tuple[str, ...] = ("mlp",)
    num_queries: int = 8
    tokens_per_batch: int = 2048
    made_up: bool = False
    waiting_gib: int = WAITING

    @cached_property
    def model(self) -> nn.Module:
        return models.build(self.shape)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        layers, _ = find_layers(self.model, self.patterns)
        return share_inputs(self.model, layers, torch.zeros(1, 2, dtype=torch.int64))

    @cached_property
    def corpus(self) -> TokenBatch:
        return models.sequences(self.num_sequences, self.length, seed=1)

    @cached_property
    def batches(self) -> list[TokenBatch]:
        groups = batches_by_tokens([self.length] * self.num_sequences, self.tokens_per_batch)
        return [self.corpus.select(torch.tensor(group)) for group in groups]

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    @cached_property
    def queries(self) -> list[Query]:
        length = min(QUERY_LENGTH, self.length)
        tokens = models.sequences(self.num_queries, length, seed=2).tokens.tolist()
        return [Query(f"query {n}", (row[0],), tuple(row[1:])) for n, row in enumerate(tokens)]

    @property
    def num_query_tokens(self) -> int:
        return self.num_queries * min(QUERY_LENGTH, self.length)

    @cached_property
    def factors(self) -> Factors:
        return fit_factors(self.model, self.layers, self.batches, seed=0)

    @cached_property
    def bases(self) -> dict[str, EigenBasis]:
        if self.made_up:
            return {
                layer.name: EigenBasis(_rotation(layer.d_in), _rotation(layer.d_out))
                for layer in self.layers
            }
        Q_A, Q_S = (
            {n: eigendecompose(c.value, n).vectors.float() for n, c in side.items()}
            for side in (self.factors.inputs, self.factors.outputs)
        )
        return {
            layer.name: EigenBasis(Q_A[layer.input_group], Q_S[layer.name]) for layer in self.layers
        }

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        return fit_spectra(self.model, self.layers, self.bases, self.batches, seed=0)

    @cached_property
    def solvers(self) -> dict[str, EKFACBlock]:
        return {
            name: EKFACBlock(self.bases[name], spectrum.values.float())
            for name, spectrum in self.spectra.items()
        }

    def random_queries(self, num: int, rank: int) -> dict[str, LowRank]:
        """Factors of the shape of prepared queries; what they hold does not change the cost."""
        generator = torch.Generator().manual_seed(3)
        return {
            layer.name: LowRank(
                torch.randn(num, layer.d_out, rank, generator=generator),
                torch.randn(num, rank, layer.d_in, generator=generator),
            )
            for layer in self.layers
        }


@cache
def _rotation(size: int) -> Tensor:
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return torch.linalg.qr(drawn)[0]


def unit(setting: Setting) -> Work:
    """One forward and backward as in training, weight gradients of all parameters included."""
    num_batches = max(1, UNIT_TOKENS // setting.tokens_per_batch)
    batches = setting.batches[:num_batches]

    def call() -> None:
        for batch in batches:
            setting.model.zero_grad(set_to_none=True)
            logits = setting.model(batch.inputs).logits
            models.torchs_loss(logits, batch, batch.targets).sum().backward()
        setting.model.zero_grad(set_to_none=True)

    return Work(call, sum(batch.tokens.numel() for batch in batches))


def ours(setting: Setting, names: Sequence[str]) -> dict[str, Work]:
    """The phases by name."""
    makers = {
        "factors": _factors,
        "eigen": _eigen,
        "lambda": _lambda,
        "query": _query,
        "stream 8": lambda s: stream_work(s, 8, RANK),
        "stream 8 full": lambda s: _stream(s, full_rank_queries(s, 8)),
        "stream 64": lambda s: stream_work(s, 64, RANK),
        "stream 1024": lambda s: stream_work(s, 1024, RANK),
        "stream 1024 shared": lambda s: stream_work(s, 1024, RANK, SHARED),
        "tokens 8": _tokens,
        "self": _self,
    }
    return {name: makers[name](setting) for name in names}


PHASES = (
    "factors", "lambda", "self", "query", "stream 8", "tokens 8", "stream 8 full", "stream 64",
    "stream 1024", "stream 1024 shared",
)  # fmt: skip


def shared_lost(setting: Setting, num_queries: int = 64) -> float:
    """What a shared subspace leaves out of so many queries on random tokens, mean over layers.

    What random factors would lose says nothing: these are gradients, of 32 tokens each.
    """
    tokens = models.sequences(num_queries, 32, seed=4).tokens.tolist()
    queries = [Query(f"{n}", (row[0],), tuple(row[1:])) for n, row in enumerate(tokens)]
    prepared = prepare_queries(
        setting.model, setting.layers, queries, {"ekfac": Method(setting.solvers, DAMPING)},
        RANK, setting.tokens_per_batch,
    )["ekfac"]  # fmt: skip
    return statistics.mean(SharedSubspace.of(query, SHARED).lost for query in prepared.values())


def disk_mib(setting: Setting) -> dict[str, float]:
    """Size of what the stages would write: A and S, their eigenvectors, Λ."""
    eigens = (
        (f"{side}/{name}", eigendecompose(covariance.value, name))
        for side, each in (("A", setting.factors.inputs), ("S", setting.factors.outputs))
        for name, covariance in each.items()
    )
    with TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("factors", "eigen", "spectra")}
        write_factors(files["factors"], setting.factors, torch.float32)
        write_eigens(files["eigen"], eigens, torch.float32)
        write_spectra(files["spectra"], setting.spectra, torch.float32)
        return {name: path.stat().st_size / MIB for name, path in files.items()}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _factors(setting: Setting) -> Work:
    return Work(
        lambda: fit_factors(setting.model, setting.layers, setting.batches, seed=0),
        setting.num_tokens,
    )


def _eigen(setting: Setting) -> Work:
    sides: list[Mapping[str, Tensor]] = [
        {name: each.value for name, each in side.items()}
        for side in (setting.factors.inputs, setting.factors.outputs)
    ]
    return Work(
        lambda: [eigendecompose(m, n) for side in sides for n, m in side.items()],
        setting.num_tokens,
    )


def _lambda(setting: Setting) -> Work:
    bases = setting.bases
    return Work(
        lambda: fit_spectra(setting.model, setting.layers, bases, setting.batches, seed=0),
        setting.num_tokens,
    )


def _query(setting: Setting) -> Work:
    solvers = setting.solvers

    def call() -> object:
        return prepare_queries(
            setting.model, setting.layers, setting.queries,
            {"ekfac": Method(solvers, DAMPING)}, RANK,
            setting.tokens_per_batch,
        )  # fmt: skip

    return Work(call, setting.num_query_tokens)


def _self(setting: Setting) -> Work:
    solvers = setting.solvers
    return Work(
        lambda: list(stream_self(setting.model, setting.layers, solvers, DAMPING, setting.batches)),
        setting.num_tokens,
    )


def _tokens(setting: Setting) -> Work:
    """Scores, and the scores by token of all that enter the top ten of either sign."""
    prepared = setting.random_queries(8, RANK)

    def call() -> list[Told]:
        return list(stream_all(setting.model, setting.layers, prepared, setting.batches, top=10))

    return Work(call, setting.num_tokens)


def stream_work(setting: Setting, num_queries: int, rank: int, columns: int | None = None) -> Work:
    """Prepared queries meet all candidates, in a subspace of so many columns or exact."""
    prepared: dict[str, Prepared] = {}
    for name, query in setting.random_queries(num_queries, rank).items():
        prepared[name] = query if columns is None else SharedSubspace.of(query, columns)
    return _stream(setting, prepared)


def full_rank_queries(setting: Setting, num: int) -> dict[str, LowRank]:
    """Random matrices of the shape of the gradients."""
    generator = torch.Generator().manual_seed(5)
    return {
        layer.name: LowRank.of(torch.randn(num, layer.d_out, layer.d_in, generator=generator), None)
        for layer in setting.layers
    }


def _stream(setting: Setting, prepared: Mapping[str, Prepared]) -> Work:
    def call() -> Tensor:
        memory = setting.waiting_gib * 2**30
        told = stream(setting.model, setting.layers, prepared, setting.batches, memory)
        return torch.cat([raw for _, raw in told], dim=1)

    return Work(call, setting.num_tokens)
