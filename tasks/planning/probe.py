"""How fast this machine is at a run's own work: a few batches of each kind, timed.

Times of passes are of as many workers at once as the run has: on a small model they wait for one
another, which no arithmetic tells.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from influence import costs
from influence.contraction import Prepared
from influence.damping import RelativeDamping
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.experts import separate_experts
from influence.factors import fit_factors
from influence.layers import Layer, find_layers
from influence.lowrank import LowRank
from influence.objectives import forward, training_loss
from influence.passes import run_pass
from influence.queries import Method, Query, prepare_queries
from influence.selfinfluence import SelfInfluence
from influence.sequences import TokenBatch
from influence.solver import GradientDot
from influence.spectrum import fit_spectra
from influence.streaming import stream_all
from influence.subspace import SharedSubspace
from influence.tokens import rescore
from tasks.layergroups import factor_bytes, spectrum_bytes
from tasks.models import load_model, replicate
from tasks.origin import Scratch
from tasks.params import RunParams
from tasks.planning.model import ModelSizes
from tasks.planning.planned import Planned
from tasks.planning.rates import Rates, of_start
from tasks.planning.scorecosts import prepared_bytes
from tasks.precision import DTYPES, SPREAD
from tasks.runners import cores_of_shard
from tasks.shards import limit_torch_threads

ENOUGH = 0.4  # seconds of one kind of work, after which no further batch is taken
BATCHES = 4  # of one kind at most: five kinds, so some 20 in all
LARGEST = 768  # rows of a matrix that is decomposed to see how fast that goes
SHARE = 0.5  # of the free memory that a probe may take
LONGEST = 20.0  # seconds of one batch by the arithmetic, at `SLOW`, above which none is tried
SLOW = 2e10  # FLOP a second of a slow core


def probe_rates(planned: Planned, device: str, started: Mapping[str, float]) -> Rates:
    """Time what the run will do, on random tokens.

    Raises:
        ValueError: a model that is not at hand, on several devices, or too large to be tried here.
    """
    if device == SPREAD:
        raise ValueError("a model over several devices is too large for a probe of a few seconds")
    shape, length = planned.sizes.model.shape, max(2, round(planned.length))
    kept = factor_bytes(planned.layers) + spectrum_bytes(planned.layers)
    kept += prepared_bytes(planned, None, 1) + 2 * prepared_bytes(planned, None, planned.methods)
    wanted = planned.weights + planned.params.runtime.workers * (planned.pass_bytes + kept)
    batch_flop = planned.batch * costs.pass_flop(shape, length)
    if wanted > SHARE * planned.hardware.free or batch_flop > LONGEST * SLOW:
        raise ValueError("the model is too large for a probe of a few seconds on this machine")
    begun = time.monotonic()
    model = _model(planned.params, planned.sizes.model, device)
    load = time.monotonic() - begun
    workers = [
        _Worker.of(planned, model, device, length) for _ in range(planned.params.runtime.workers)
    ]
    kinds: dict[str, Callable[[_Worker], object]] = {
        "factors": _Worker.fit, "correct": _Worker.correct, "stream": _Worker.stream,
        "score": _Worker.rescore,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        limit_torch_threads(cores_of_shard(planned.params.runtime))
        plain = _seconds(workers, _Worker.plain) / workers[0].num_tokens
        by_token = {
            name: _seconds(workers, work) / workers[0].num_tokens for name, work in kinds.items()
        }
        by_query = _seconds(workers[:1], _Worker.prepare) / workers[0].num_queries
        fb = _seconds(workers[:1], _Worker.train) / workers[0].num_tokens
        size = min(LARGEST, max(costs.sides(planned.layers)))
        eigen = _seconds(workers, lambda _: _decompose(size)) / costs.eigen_flop(size)
    finally:
        torch.set_num_threads(threads)
    return replace(
        of_start(started), load=load, fb=fb, by_token=by_token, by_query=by_query, eigen=eigen,
        flops=costs.pass_flop(shape, length) / plain,
    )  # fmt: skip


def _model(params: RunParams, sizes: ModelSizes, device: str) -> Any:
    dtype = DTYPES[params.runtime.dtype]
    if sizes.folder is not None:
        return load_model(sizes.folder, device, dtype, sizes.adapter)
    from tasks.scratch import new_model

    assert isinstance(params.train, Scratch)
    model: Any = new_model(params.train.scratch, params.train.scratch.vocabulary)
    model.config.use_cache = False
    return model.to(device, dtype).eval().requires_grad_(False)


def _seconds(workers: Sequence["_Worker"], work: Callable[["_Worker"], object]) -> float:
    """Seconds of one batch, where all work at once: the time of all ÷ the batches of all."""
    with ThreadPoolExecutor(len(workers)) as pool:

        def timed(worker: _Worker) -> tuple[int, float]:
            limit_torch_threads(worker.cores)
            begun, done = time.monotonic(), 0
            while not done or (done < BATCHES and time.monotonic() - begun < ENOUGH):
                work(worker)
                worker.wait()
                done += 1
            return done, time.monotonic() - begun

        if len(workers) == 1:
            work(workers[0])  # the first is slow
        found = list(pool.map(timed, workers))
    return 1 / sum(done / seconds for done, seconds in found)


def _decompose(size: int) -> None:
    matrix = torch.rand(size, size, dtype=torch.float64)
    torch.linalg.eigh(matrix + matrix.mT)


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker's model, a batch of random tokens, and random queries."""

    model: Any
    layers: tuple[Layer, ...]
    batch: TokenBatch
    queries: Mapping[str, Prepared]
    full: Mapping[str, torch.Tensor]
    solvers: Mapping[str, EKFACBlock]
    asked: tuple[Query, ...]
    pairs: tuple[tuple[int, int], ...]
    params: RunParams
    cores: int
    device: str

    @classmethod
    def of(cls, planned: Planned, model: Any, device: str, length: int) -> "_Worker":
        own = separate_experts(replicate(model))
        layers, _ = find_layers(own, planned.params.layers)
        groups = {layer.name: layer.input_group for layer in planned.layers}
        layers = tuple(
            Layer(e.name, e.module, e.d_in, e.d_out, e.has_bias, groups[e.name]) for e in layers
        )
        count, params = max(1, planned.batch // length), planned.params
        supervised = torch.ones(count, length, dtype=torch.bool)
        supervised[:, 0] = False
        tokens = torch.randint(planned.sizes.model.shape.vocabulary, (count, length))
        batch = TokenBatch(torch.arange(count), tokens, supervised).to(device)
        like, num = next(own.parameters()), planned.sizes.num_queries
        size = max(2, min(round(planned.sizes.query_length), length))
        row = tuple(tokens[0, :size].tolist())
        score = params.score
        pairs = min(2 * score.top, planned.num_candidates) * num
        sequences = min(pairs + score.control, planned.num_candidates)
        a_batch = round(count * pairs / max(1, sequences))
        return cls(
            own, layers, batch,
            _prepared(layers, num * planned.methods, params, like),
            _dense(layers, num, like), _solvers(layers, like),
            (Query("", row[:-1], row[-1:]),) * min(num, 8),
            tuple((at % num, at // num % count) for at in range(a_batch)), params,
            cores_of_shard(params.runtime), device,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.batch.tokens.numel()

    @property
    def num_queries(self) -> int:
        return len(self.asked)

    def wait(self) -> None:
        """A GPU is done when it says so."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def plain(self) -> None:
        run_pass(self.model, self.layers, self.batch, training_loss)

    def fit(self) -> None:
        fit_factors(self.model, self.layers, [self.batch], 0)

    def correct(self) -> None:
        bases = {name: solver.basis for name, solver in self.solvers.items()}
        fit_spectra(self.model, self.layers, bases, [self.batch], 0)

    def stream(self) -> None:
        settings = self.params.stream
        selves = (
            SelfInfluence(self.solvers, RelativeDamping(0.1)) if settings.self_influence else None
        )
        list(stream_all(self.model, self.layers, self.queries, [self.batch], selves=selves))

    def rescore(self) -> None:
        rescore(self.model, self.layers, self.full, self.batch, list(self.pairs), 1)

    def prepare(self) -> None:
        dots = {layer.name: GradientDot() for layer in self.layers}
        ways = {f"{at}": Method(self.solvers, RelativeDamping(0.1))
                for at in range(1 + len(self.params.query.damping_grid))}  # fmt: skip
        ways["dot"] = Method(dots, RelativeDamping(0.1))
        prepare_queries(
            self.model, self.layers, self.asked, ways, self.params.query.rank, self.num_tokens
        )

    def train(self) -> None:
        weights = list(self.model.parameters())
        for weight in weights:
            weight.requires_grad_()
        try:
            loss = training_loss(forward(self.model, self.batch), self.batch).sum()
            torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)


def _dense(layers: Sequence[Layer], queries: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    return {layer.name: torch.rand(queries, layer.d_out, layer.d_in).to(like) for layer in layers}


def _prepared(
    layers: Sequence[Layer], queries: int, params: RunParams, like: torch.Tensor
) -> dict[str, Prepared]:
    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape).to(like)

    made: dict[str, Prepared] = {}
    for layer in layers:
        i, o, columns = layer.d_in, layer.d_out, params.stream.subspace
        if columns is not None:
            a, s = costs.shared_sides(layer, queries, params.query.rank, columns)
            cores = random(queries, s, a)
            made[layer.name] = SharedSubspace(random(o, s), random(i, a), cores, lost=0.0)
        else:
            kept = costs.kept_rank(layer, params.query.rank)
            made[layer.name] = LowRank(random(queries, o, kept), random(queries, kept, i))
    return made


def _solvers(layers: Sequence[Layer], like: torch.Tensor) -> dict[str, EKFACBlock]:
    """Of unit matrices: products cost the same whatever is in them."""
    return {
        layer.name: EKFACBlock(
            EigenBasis(torch.eye(layer.d_in).to(like), torch.eye(layer.d_out).to(like)),
            torch.ones(layer.d_out, layer.d_in).to(like),
        )
        for layer in layers
    }
