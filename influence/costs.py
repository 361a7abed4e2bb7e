"""What attribution costs, from shapes alone: numbers kept, and floating-point operations (FLOP).

A multiply-add is two FLOP. Work is told in fb as well: one fb is a forward and backward of training
over the same tokens, 6 FLOP a weight and token and what attention adds (Kaplan et al. 2020, §2.1).
Which form of a product runs is asked of the code that chooses it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from influence import subspace
from influence.contraction import forms_gradients
from influence.eigenbasis import EigenBasis
from influence.layers import Layer
from influence.lowrank import ITERATIONS, SPARE, LowRank
from influence.sums import num_upper

Number = int | float  # whole or an average
Length = Callable[[Layer], Number]  # tokens of a sequence that a layer sees; an expert sees some


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as far as its costs go.

    Attributes:
        layers: the attributed ones; their modules may be on the meta device.
        num_parameters: all, tied ones once.
        num_multiplied: weights that a token is multiplied with: all linear layers, the head too; of
            experts those that it is routed to.
        attention: width of queries and keys, summed over the blocks.
        vocabulary: columns of the logits.
        routed: tokens that reach an expert's layer ÷ all, by its name, if all are chosen alike.
    """

    layers: tuple[Layer, ...]
    num_parameters: int
    num_multiplied: Number
    attention: int
    vocabulary: int
    routed: Mapping[str, float] = field(default_factory=dict)

    def share(self, layer: Layer) -> float:
        """Tokens that reach a layer ÷ all."""
        return self.routed.get(layer.name, 1.0)


def inputs_of(layers: Sequence[Layer]) -> list[int]:
    """d_in of each input once, however many layers take it."""
    return list({layer.input_group: layer.d_in for layer in layers}.values())


def sides(layers: Sequence[Layer]) -> list[int]:
    """Sizes of all A, one an input, and of all S."""
    return [*inputs_of(layers), *(layer.d_out for layer in layers)]


def num_weights(layers: Sequence[Layer]) -> int:
    """Weights and biases; as many numbers are in Λ."""
    return sum(layer.d_in * layer.d_out for layer in layers)


def num_covariances(layers: Sequence[Layer], blocks: int = 1) -> int:
    """Numbers of A and S, and of Q_A and Q_S; cut into diagonal blocks, a part of them
    (Grosse et al. 2023, Appendix A)."""
    return sum(size**2 for size in sides(layers)) // blocks


def num_packed(layers: Sequence[Layer]) -> int:
    """Numbers of one half of each A and S, the diagonal included."""
    return sum(size * (size + 1) // 2 for size in sides(layers))


def curvature_ratio(layers: Sequence[Layer], blocks: int = 1) -> float:
    """Numbers of EK-FAC ÷ weights: M/P + P/M + 1 of a layer (Grosse et al. 2023, Eq. 27)."""
    return (num_covariances(layers, blocks) + num_weights(layers)) / num_weights(layers)


def kept_rank(layer: Layer, rank: int | None) -> int:
    """Columns of a prepared query; None, or more than a matrix has, is full rank."""
    full = min(layer.d_in, layer.d_out)
    return full if rank is None else min(rank, full)


def num_prepared(layers: Sequence[Layer], rank: int | None) -> int:
    """Numbers of one prepared query: both factors of every layer."""
    return sum((layer.d_in + layer.d_out) * kept_rank(layer, rank) for layer in layers)


def training_flop(model: ModelShape, length: Number) -> Number:
    """Of one token in a sequence of `length`: forward, input gradients, weight gradients: 1 fb."""
    return 6 * model.num_multiplied + 12 * model.attention * length


def pass_flop(
    model: ModelShape, length: Number, forwards: Number = 1, backwards: Number = 1
) -> Number:
    """Of one token: forward and input gradients; no weight gradient is formed.

    Args:
        model: that it passes through.
        length: of its sequence.
        forwards: so many.
        backwards: so many, in parts of the way from the loss to the lowest block.
    """
    forward = 2 * model.num_multiplied + 4 * model.attention * length
    backward = 2 * model.num_multiplied + 8 * model.attention * length
    return forwards * forward + backwards * backward


def factor_flop(model: ModelShape) -> Number:
    """Of one token: its products for A and S, of which blocks below the diagonal are left out."""
    inputs = {layer.input_group: (layer, layer.d_in) for layer in model.layers}
    both = [*inputs.values(), *((layer, layer.d_out) for layer in model.layers)]
    return sum(2 * model.share(layer) * num_upper(size) for layer, size in both)


def rotation_flop(layer: Layer, length: Number) -> Number:
    """Of one sequence: its gradient formed and rotated, each side before the sum or after it."""
    return _rotation_flop(layer.d_in, layer.d_out, length)


@cache
def _rotation_flop(i: int, o: int, length: Number, has_inputs: bool = False) -> Number:
    """`has_inputs`: they are rotated already."""
    basis = _basis(i, o)
    inputs = length if basis.rotates_inputs_first(round(length)) else o
    outputs = length if basis.rotates_outputs_first(round(length)) else i
    return 2 * inputs * i**2 * (not has_inputs) + 2 * outputs * o**2 + 2 * length * i * o


@cache
def _basis(i: int, o: int) -> EigenBasis:
    return EigenBasis(torch.empty(i, i, device="meta"), torch.empty(o, o, device="meta"))


def spectrum_flop(layers: Sequence[Layer], length: Length) -> Number:
    """Of one sequence: rotated gradients, squared and added; an input that is rotated is so for all
    layers in a row that take it (`RotatedInputs`)."""
    total, rotated = 0.0, None
    for each in layers:
        columns, shares = length(each), each.input_group == rotated
        total += _rotation_flop(each.d_in, each.d_out, columns, shares) + 2 * each.d_in * each.d_out
        first = _basis(each.d_in, each.d_out).rotates_inputs_first(round(columns))
        # Tokens that are routed to an expert are packed anew for each of its layers.
        if not shares:
            rotated = each.input_group if first and not each.is_routed else None
    return total


def eigen_flop(size: int) -> Number:
    """All eigenvalues and eigenvectors of a symmetric matrix: 9 n³ (Golub and Van Loan 2013, §8.3).

    An order of magnitude: the divide-and-conquer that runs does less where eigenvalues cluster.
    """
    return 9.0 * size**3


def query_flop(
    layers: Sequence[Layer], length: Length, rank: int | None, dampings: int, plain: bool = False
) -> Number:
    """Of one query: its gradient rotated once; divided, truncated and rotated back once a damping.

    Args:
        layers: the attributed ones.
        length: tokens of prompt and completion that reach a layer.
        rank: of what is kept.
        dampings: how many.
        plain: whether the gradient itself is wanted too.
    """
    total = 0.0
    for layer in layers:
        i, o, kept = layer.d_in, layer.d_out, kept_rank(layer, rank)
        total += rotation_flop(layer, length(layer)) + 2 * length(layer) * i * o * plain
        total += (dampings + plain) * truncation_flop(layer, rank)
        total += dampings * 2 * kept * (i**2 + o**2)
    return total


def truncation_flop(layer: Layer, rank: int | None) -> Number:
    """The leading singular vectors of one matrix."""
    long, short = max(layer.d_in, layer.d_out), min(layer.d_in, layer.d_out)
    if rank is None or rank >= short:
        return 0.0
    columns = rank + SPARE
    if 4 * columns > short:  # R-SVD (Golub and Van Loan 2013, Fig. 8.6.1)
        return 6.0 * long * short**2 + 20.0 * short**3
    products = 2 + 2 * ITERATIONS
    return products * (2.0 * long * short * columns + 2.0 * long * columns**2)


def contraction_flop(
    layer: Layer,
    length: Number,
    num_queries: int,
    rank: int | None,
    window: Number = float("inf"),
    columns: int | None = None,
) -> Number:
    """Of one sequence with all queries, in the form that `Contractions` takes.

    Args:
        layer: whose part it is.
        length: tokens.
        num_queries: dampings and baselines are queries too.
        rank: of what is kept of a query.
        window: sequences that meet the dense matrices before these are made anew.
        columns: of a subspace that all queries share; None: exact.
    """
    i, o, kept = layer.d_in, layer.d_out, kept_rank(layer, rank)
    if columns is not None:
        a_side, s_side = shared_sides(layer, num_queries, rank, columns)
        met = 2 * (length + num_queries) * a_side * s_side
        return 2 * length * (i * a_side + o * s_side) + met
    if _forms_gradients(i, o, num_queries, kept, round(length), window):
        made = num_queries * kept / window
        return 2 * (length + num_queries + made) * i * o
    return 2 * length * num_queries * kept * (i + o)


def num_shared(layer: Layer, num_queries: int, rank: int | None, columns: int) -> Number:
    """Numbers of a layer's queries in a subspace of so many columns."""
    a_side, s_side = shared_sides(layer, num_queries, rank, columns)
    return num_queries * a_side * s_side + layer.d_in * a_side + layer.d_out * s_side


def subspace_flop(layer: Layer, num_queries: int, rank: int | None, columns: int) -> Number:
    """Of finding the subspace that a layer's queries share, and the queries in it."""
    kept = kept_rank(layer, rank)
    length, times = num_queries * kept, subspace.ITERATIONS + 2
    a_side, s_side = shared_sides(layer, num_queries, rank, columns)
    total = 2.0 * length * a_side * s_side
    for width, side in ((layer.d_in, a_side), (layer.d_out, s_side)):
        total += 2 * length * width * (2 * kept + side)
        searched = min(width, length, columns + subspace.SPARE)
        by_gram = length >= subspace.GRAM * width
        if columns < width:
            once = width if by_gram else 2 * length
            total += times * 2 * once * width * searched + 4 * width * searched**2
            total += 2 * length * num_upper(width) * by_gram
    return total


def shared_sides(layer: Layer, num_queries: int, rank: int | None, columns: int) -> tuple[int, int]:
    """Columns that the subspace has on the inputs' side and on the outputs'."""
    shared = min(columns, num_queries * kept_rank(layer, rank))
    sides = [width if columns >= width else shared for width in (layer.d_in, layer.d_out)]
    return sides[0], sides[1]


@cache
def _forms_gradients(
    i: int, o: int, num_queries: int, rank: int, length: int, window: Number
) -> bool:
    left = torch.empty(num_queries, o, rank, device="meta")
    right = torch.empty(num_queries, rank, i, device="meta")
    return forms_gradients(LowRank(left, right), length, window)
