"""Preconditioned L-BFGS on many independent problems side by side (Nocedal 1980)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Vectors = Float[Tensor, "k p"]
Numbers = Float[Tensor, " k"]
Values = tuple[Numbers, Vectors]  # of the objectives, and their gradients
ValuesAt = Callable[[Vectors, Int[Tensor, " k"]], Values]
Precondition = Callable[[Vectors], Vectors]

HISTORY = 8  # pairs that a problem remembers
HALVINGS = 30  # of a step: what has not gone down by then, rounding or a kink holds up
STEEP = 0.9  # of the slope at the start, that a step may leave
DECREASE = 1e-4  # of what the slope promises


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where each problem ended.

    `norms` are √(gᵀP⁻¹g) there, `evaluations` how often each problem's gradient was taken.
    """

    points: Vectors
    norms: Numbers
    evaluations: Int[Tensor, " k"]


def minimise(
    values_at: ValuesAt,
    precondition: Precondition,
    start: Vectors,
    tolerances: Numbers,
    max_evaluations: int,
) -> Minimum:
    """Minimise objectives that may have kinks; each problem has its own step and history.

    A problem ends when it is solved, when its evaluations are used up, or when no step down is
    found along either P⁻¹g or the direction of its history: at a kink the gradient jumps, and need
    not vanish at the minimum.

    Args:
        values_at: objectives and gradients at points, one for each of the problems named beside.
        precondition: the initial inverse Hessian P⁻¹.
        start: a point for each problem.
        tolerances: a problem is solved when √(gᵀP⁻¹g) is at most this.
        max_evaluations: of each problem.
    """
    x = start.clone()
    value, gradient = values_at(x, torch.arange(len(x)))
    natural = precondition(gradient)
    evaluations = torch.ones(len(x), dtype=torch.long)
    held = torch.zeros(len(x), dtype=torch.bool)  # no step down was found
    pairs: list[_Pair] = []
    while True:
        open_ = (_norms(gradient, natural) > tolerances) & ~held & (evaluations < max_evaluations)
        active = open_.nonzero()[:, 0]
        if not len(active):
            return Minimum(x, _norms(gradient, natural), evaluations)
        g = gradient[active]
        direction = -_two_loops([pair.of(active) for pair in pairs], g, natural[active])
        # A history that does not descend is not used for that problem.
        descends = (direction * g).sum(dim=1) < 0
        direction = torch.where(descends[:, None], direction, -natural[active])
        step = _search(
            values_at, x[active], (value[active], g), direction, active,
            max_evaluations - evaluations[active],
        )  # fmt: skip
        evaluations[active] += step.evaluations
        _forget(pairs, active[~step.found], held)
        after = precondition(step.gradients)
        pair = _Pair(torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x))
        pair.s[active], pair.y[active] = step.points - x[active], step.gradients - g
        pair.natural[active] = after - natural[active]
        pairs = [*pairs, pair][-HISTORY:]
        x[active], value[active], gradient[active] = step.points, step.values, step.gradients
        natural[active] = after


@dataclass(frozen=True, slots=True)
class _Pair:
    """A step s, the change y of the gradient along it, and P⁻¹y, for each problem.

    P⁻¹y is the difference of two P⁻¹g: P⁻¹, which may cost more than a gradient, is applied once
    at each new point and nowhere else.
    """

    s: Vectors
    y: Vectors
    natural: Vectors

    def of(self, problems: Int[Tensor, " k"]) -> "_Pair":
        return _Pair(self.s[problems], self.y[problems], self.natural[problems])


def _forget(pairs: list[_Pair], stays: Tensor, held: Tensor) -> None:
    """What found no step tries without its history; what has none is held, for good."""
    remembers = [pair.s[stays].any(dim=1) for pair in pairs]
    held[stays] = ~torch.stack(remembers).any(dim=0) if pairs else True
    for pair in pairs:
        pair.s[stays] = 0


def _norms(gradient: Vectors, natural: Vectors) -> Numbers:
    return (gradient * natural).sum(dim=1).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class _Step:
    """Points with their values and gradients; where none was `found`, those of before."""

    points: Vectors
    values: Numbers
    gradients: Vectors
    found: Tensor
    evaluations: Int[Tensor, " k"]


def _search(
    values_at: ValuesAt,
    x: Vectors,
    here: Values,
    direction: Vectors,
    problems: Int[Tensor, " k"],
    most: Int[Tensor, " k"],
) -> _Step:
    """A step along each direction, halved for its own problem only until it is taken.

    Taken is a step that leaves at most `STEEP` of the slope on either side (the strong curvature
    condition): near the optimum the values agree to all digits, and only gradients still tell. Past
    a kink the slope may be steep upwards at any step; there one is taken that goes down as far as
    promised and is no longer as steep downwards (the weak conditions; Lewis and Overton 2013).
    """
    value, gradient = here
    slope = (direction * gradient).sum(dim=1)
    size, found = torch.ones_like(slope), torch.zeros(len(x), dtype=torch.bool)
    points, values, gradients = x.clone(), value.clone(), gradient.clone()
    tries = torch.zeros(len(x), dtype=torch.long)
    trying = torch.arange(len(x))
    while len(trying):
        moved = x[trying] + size[trying, None] * direction[trying]
        new, new_gradient = values_at(moved, problems[trying])
        tries[trying] += 1
        before, after = slope[trying], (direction[trying] * new_gradient).sum(dim=1)
        strong = after.abs() <= STEEP * before.abs()
        down = new <= value[trying] + DECREASE * size[trying] * before
        taken = strong | (down & (after >= STEEP * before))
        at = trying[taken]
        points[at], values[at], gradients[at] = moved[taken], new[taken], new_gradient[taken]
        found[at] = True
        trying = trying[~taken & (tries[trying] < most[trying].clamp(max=HALVINGS))]
        size[trying] /= 2
    return _Step(points, values, gradients, found, tries)


def _two_loops(pairs: Sequence[_Pair], gradient: Vectors, natural: Vectors) -> Vectors:
    """H g with the L-BFGS inverse Hessian H; a problem's pairs without curvature are skipped."""
    q, inverse_q, used = gradient, natural, []
    for pair in reversed(pairs):
        sy = (pair.s * pair.y).sum(dim=1)
        rho = torch.where(sy > 0, 1 / sy, 0.0)
        alpha = rho * (pair.s * q).sum(dim=1)
        q = q - alpha[:, None] * pair.y
        inverse_q = inverse_q - alpha[:, None] * pair.natural
        used.append((pair, rho, alpha))
    found = _scale(pairs[-1])[:, None] * inverse_q if pairs else inverse_q
    for pair, rho, alpha in reversed(used):
        found = found + (alpha - rho * (pair.y * found).sum(dim=1))[:, None] * pair.s
    return found


def _scale(newest: _Pair) -> Numbers:
    """sᵀy / yᵀP⁻¹y: how far P⁻¹ is off along the newest step (Nocedal and Wright, 7.20)."""
    sy, natural = (newest.s * newest.y).sum(dim=1), (newest.y * newest.natural).sum(dim=1)
    return torch.where((sy > 0) & (natural > 0), sy / natural, 1.0)
