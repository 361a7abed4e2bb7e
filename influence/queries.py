"""Queries: ∇f with f = log p(completion | prompt), preconditioned once and truncated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.damping import Damping
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.examples import Batch
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import log_probability
from influence.passes import run_pass
from influence.sequences import TokenBatch, batches_by_tokens
from influence.solver import LayerSolver


@dataclass(frozen=True, slots=True)
class Query:
    """What the model was asked and what it said, as token ids.

    With a contrast, f is the difference log p(completion | prompt) − log p(contrast | prompt).
    """

    name: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    contrast: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for part in ("prompt", "completion"):
            if not getattr(self, part):
                raise ValueError(
                    f"query {self.name!r} has an empty {part}; f = log p(completion | prompt) "
                    "needs at least one token of each"
                )


def query_batch(queries: Sequence[Query]) -> TokenBatch:
    """Queries as a batch: the completion is supervised, the prompt is not (Eq. 24).

    The ids are the queries' places in the list; contrasts, where there are any, follow all
    completions.
    """
    ids = [*range(len(queries)), *_contrasted(queries)]
    ends = [each.completion for each in queries] + [each.contrast for each in queries]
    ends = [end for end in ends if end]
    tokens = [torch.tensor(queries[at].prompt + end) for at, end in zip(ids, ends, strict=True)]
    supervised = [
        torch.arange(len(row)) >= len(queries[at].prompt)
        for at, row in zip(ids, tokens, strict=True)
    ]
    return TokenBatch.collate(ids, tokens, supervised)


def measured(
    outputs: Float[Tensor, "n t v"], batch: TokenBatch, num_queries: int
) -> Float[Tensor, " n"]:
    """What each sequence of a `query_batch` adds to the f of its query: a contrast takes away."""
    signs = torch.ones(len(batch.ids), device=outputs.device)
    signs[num_queries:] = -1
    return signs * log_probability(outputs, batch)


def _contrasted(queries: Sequence[Query]) -> list[int]:
    return [at for at, query in enumerate(queries) if query.contrast]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to precondition: each layer's solver, and the rule for λ."""

    solvers: Mapping[str, LayerSolver]
    damping: Damping


def prepare_queries(
    model: nn.Module,
    layers: Sequence[Layer],
    queries: Sequence[Query],
    methods: Mapping[str, Method],
    rank: int | None,
    tokens_per_batch: int,
) -> dict[str, dict[str, LowRank]]:
    """(G + λI)⁻¹∇f of every layer, truncated to `rank`, by several methods at once.

    For EK-FAC a query's tokens are rotated, not its gradient, and each batch is truncated before
    the next: dense matrices of all queries are never in memory together. A layer that a query does
    not run has gradient 0 there.

    Args:
        model: in evaluation mode.
        layers: the attributed layers.
        queries: prompts and completions.
        methods: by name; a grid of dampings is several.
        rank: of what is kept; None for full rank.
        tokens_per_batch: of one pass.
    """
    parameter = next(model.parameters())
    prepared: dict[str, dict[str, LowRank]] = {method: {} for method in methods}
    lengths = [_num_tokens(query) for query in queries]
    for rows in batches_by_tokens(lengths, tokens_per_batch):
        asked = _Asked.of(model, layers, [queries[row] for row in rows], parameter.device)
        for name, io in asked.ios.items():
            gradients = _Gradients(asked, io)
            # Dampings share what solves them: it is read once, and the gradient rotated once.
            shared = {id(given.solvers): given.solvers for given in methods.values()}
            solvers = {key: by_layer[name] for key, by_layer in shared.items()}
            for method, given in methods.items():
                solved = _solved(solvers[id(given.solvers)], given.damping, rank, gradients)
                into = prepared[method].setdefault(name, solved.zeros(len(queries)))
                into.left[rows], into.right[rows] = solved.left, solved.right
    never = [layer for layer in layers if layer.name not in next(iter(prepared.values()))]
    for layer in never:
        for found in prepared.values():
            V = torch.zeros(len(queries), layer.d_out, layer.d_in)
            V = V.to(layer.device, parameter.dtype)
            found[layer.name] = LowRank.of(V, rank)
    return prepared


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a batch of queries gave: layer inputs and output gradients of each sequence."""

    ios: Mapping[str, LayerIO]
    owners: Int[Tensor, " n"]
    num_queries: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Sequence[Layer],
        queries: Sequence[Query],
        device: torch.device,
    ) -> "_Asked":
        batch = query_batch(queries).to(device)

        def objective(outputs: Tensor, batch: Batch) -> Float[Tensor, " n"]:
            assert isinstance(batch, TokenBatch)
            return measured(outputs, batch, len(queries))

        return cls(run_pass(model, layers, batch, objective), batch.ids, len(queries))

    def by_query(self, sequences: Float[Tensor, "n ..."]) -> Float[Tensor, "q ..."]:
        """Gradients of completions, those of contrasts added to their own."""
        own, others = sequences[: self.num_queries], sequences[self.num_queries :]
        owners = self.owners[self.num_queries :].to(own.device)
        return own.index_add(0, owners, others) if len(others) else own


def _num_tokens(query: Query) -> int:
    """What a query takes of a batch, its contrast included."""
    both = len(query.prompt) + len(query.completion)
    return both + (len(query.prompt) + len(query.contrast) if query.contrast else 0)


@dataclass
class _Gradients:
    """Those of a batch's queries at one layer, in either form, made once when first asked for."""

    asked: _Asked
    io: LayerIO
    _rotated: dict[int, tuple[EigenBasis, Tensor]] = field(default_factory=dict, init=False)

    @cached_property
    def plain(self) -> Float[Tensor, "q d_out d_in"]:
        """∇f."""
        return self.asked.by_query(self.io.gradient())

    def rotated(self, basis: EigenBasis) -> Float[Tensor, "q d_out d_in"]:
        """Q_Sᵀ ∇f Q_A."""
        if id(basis) not in self._rotated:
            found = self.asked.by_query(basis.rotate_gradient(self.io))
            self._rotated[id(basis)] = basis, found  # which keeps the identity its own
        return self._rotated[id(basis)][1]


def _solved(
    solver: LayerSolver, damping: Damping, rank: int | None, gradients: _Gradients
) -> LowRank:
    """One layer's answer; which of the two forms of the gradient is needed, the solver decides."""
    if not isinstance(solver, EKFACBlock):
        return LowRank.of(solver.solve(gradients.plain, damping), rank)
    # The truncated SVD commutes with a rotation: truncate in the eigenbasis and rotate only the
    # factors back.
    low = LowRank.of(solver.solve_rotated(gradients.rotated(solver.basis), damping), rank)
    return low.mapped(solver.basis.unrotate_outputs, solver.basis.unrotate_inputs)
