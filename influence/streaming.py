"""One backward over the candidates, and all that is wanted of it: scores, own influence, tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO, LayerIOs
from influence.contraction import ByToken, Contractions, Prepared, Waiting
from influence.eigenbasis import RotatedInputs
from influence.examples import Batch
from influence.layers import Layer
from influence.objectives import training_loss
from influence.passes import check_finite_layers, run_pass
from influence.scores import TopK
from influence.selfinfluence import SelfInfluence, side_by_side
from influence.subspace import SharedSubspace

MEMORY = 2**31
Grids = Mapping[tuple[int, int], Float[Tensor, "l t"]]


@dataclass(frozen=True, slots=True)
class Told:
    """What one backward over a batch told, all of it raw: no sign is turned, nothing divided by N.

    Attributes:
        ids: of the batch's sequences.
        scores: ⟨V_q, ∇L(z_n)⟩ of each layer, in the dtype of the pass; over layers they add up to
            the score of the sequence.
        self_influence: ∇Lᵀ(G + λI)⁻¹∇L of each layer; None if it was not asked for.
        grids: by (query, id), the score by layer and position, of the sequences that were among
            the highest or lowest of a query so far.
    """

    ids: Int[Tensor, " n"]
    scores: Float[Tensor, "q n l"]
    self_influence: Float[Tensor, "n l"] | None
    grids: Grids


def stream(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, Prepared],
    batches: Iterable[Batch],
    memory: int = MEMORY,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n l"]]]:
    """Ids and raw scores alone; see `stream_all`."""
    for told in stream_all(model, layers, prepared, batches, memory):
        yield told.ids, told.scores


def stream_all(
    model: nn.Module,
    layers: Sequence[Layer],
    prepared: Mapping[str, Prepared],
    batches: Iterable[Batch],
    memory: int = MEMORY,
    selves: SelfInfluence | None = None,
    top: int = 0,
) -> Iterator[Told]:
    """What is wanted of each batch, from one forward and backward; dampings are more queries.

    Args:
        model: in evaluation mode.
        layers: the attributed layers.
        prepared: the queries of each layer, exact or in a subspace that they share.
        batches: the candidates.
        memory: bytes for dense matrices of many queries, or for gradients that wait to meet them.
        selves: if self-influence is wanted.
        top: token grids are told of the so many highest and lowest of each query so far.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, instead of a score that is not finite.
    """
    contractions = Contractions(prepared, memory)
    tokens = _TopTokens(layers, prepared, top)
    held: list[_Held] = []

    for batch in batches:
        ios = run_pass(model, layers, batch, training_loss)
        held.append(_begun(contractions, layers, batch, ios, selves, top > 0))
        del ios  # what a pass captured must not stay while the next one runs
        waits = any(isinstance(each, Waiting) for each in held[-1].by_layer)
        if not waits or sum(len(each.batch.ids) for each in held) >= contractions.window:
            yield from _finished(contractions, layers, held, tokens)
            held.clear()
    yield from _finished(contractions, layers, held, tokens)


@dataclass(frozen=True, slots=True)
class _Held:
    """A batch of which not everything is told.

    Where tokens are wanted, a layer is in `tokens`, whose tokens met the queries one by one, or in
    `ios`, whose tokens will do so for those sequences alone that turn out to be at the top.
    """

    batch: Batch
    by_layer: list[Tensor | Waiting]
    self_influence: Float[Tensor, "n l"] | None
    tokens: Mapping[str, Float[Tensor, "q n t"]]
    ios: LayerIOs


def _begun(
    contractions: Contractions,
    layers: Sequence[Layer],
    batch: Batch,
    ios: LayerIOs,
    selves: SelfInfluence | None,
    wants_tokens: bool,
) -> _Held:
    by_layer: list[Tensor | Waiting] = []
    own: list[Tensor] = []
    tokens: dict[str, Tensor] = {}
    unmet: list[str] = []
    shared = RotatedInputs()
    for layer in layers:
        io = ios.get(layer.name)
        if selves is not None:
            own.append(selves.of(batch, layer, io, shared))
        if io is None:  # an idle expert: no gradient, no influence
            zeros = _zeros(contractions.prepared[layer.name], len(batch.ids))
            by_layer.append(zeros)
        elif wants_tokens and (by_token := contractions.by_token(layer, io)) is not None:
            tokens[layer.name] = io.spread(by_token.tokens(io), batch.inputs.shape[1])
            by_layer.append(tokens[layer.name].sum(dim=-1))
        else:
            by_layer.append(contractions.begin(layer, io))
            if wants_tokens:
                unmet.append(layer.name)
    forms = None if selves is None else side_by_side(own, layers, batch)
    return _Held(batch, by_layer, forms, tokens, ios.only(unmet))


def _finished(
    contractions: Contractions,
    layers: Sequence[Layer],
    held: Sequence[_Held],
    tokens: "_TopTokens",
) -> Iterator[Told]:
    """What the batches held tell, once all that waits has met the queries."""
    for at, layer in enumerate(layers):
        waiting = [one for each in held if isinstance(one := each.by_layer[at], Waiting)]
        if waiting:
            found = contractions.finish(layer.name, waiting)
            parts = iter(found.split([len(each.gradients) for each in waiting], dim=1))
            for each in held:
                if isinstance(each.by_layer[at], Waiting):
                    each.by_layer[at] = next(parts)
    for each in held:
        columns = [one for one in each.by_layer if isinstance(one, Tensor)]
        raw = torch.stack([one.to(each.batch.ids.device) for one in columns], dim=-1)
        check_finite_layers(raw.sum(dim=0), layers, each.batch)
        yield Told(each.batch.ids, raw, each.self_influence, tokens.of(each, raw))


@dataclass
class _TopTokens:
    """Token grids of the sequences that enter the highest or lowest of a query."""

    layers: Sequence[Layer]
    prepared: Mapping[str, Prepared]
    top: int
    _best: tuple[TopK, TopK] | None = field(default=None, init=False)

    def of(self, held: _Held, raw: Float[Tensor, "q n l"]) -> Grids:
        if not self.top:
            return {}
        ids, scores = held.batch.ids, raw.double().sum(dim=-1)
        new = TopK.of(ids, scores, self.top), TopK.of(ids, -scores, self.top)
        if self._best is not None:
            new = new[0].merge(self._best[0]), new[1].merge(self._best[1])
        self._best = new
        entered = torch.cat([each.ids for each in new], dim=1)  # of each query
        grids = {}
        for row, number in enumerate(ids.tolist()):
            queries = [q for q, numbers in enumerate(entered.tolist()) if number in numbers]
            ios = dict(held.ios.select(row)) if queries else {}
            grids |= {(q, number): self._grid(held, q, row, ios) for q in queries}
        return grids

    def _grid(
        self, held: _Held, query: int, row: int, ios: Mapping[str, LayerIO]
    ) -> Float[Tensor, "l t"]:
        rows = []
        for layer in self.layers:
            if layer.name in held.tokens:
                rows.append(held.tokens[layer.name][query, row])
            elif layer.name in ios:
                one = ByToken.of(self.prepared[layer.name].select([query]), layer.has_bias)
                io = ios[layer.name]
                rows.append(io.spread(one.tokens(io), held.batch.inputs.shape[1])[0, 0])
            else:  # an idle expert
                rows.append(_zeros(self.prepared[layer.name], held.batch.inputs.shape[1])[query])
        return torch.stack([one.to(held.batch.ids.device) for one in rows])


def _zeros(queries: Prepared, columns: int) -> Float[Tensor, "q columns"]:
    """What queries score where they meet no gradient."""
    side = queries.cores if isinstance(queries, SharedSubspace) else queries.left
    return side.new_zeros(queries.num_queries, columns)
