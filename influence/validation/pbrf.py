"""The proximal Bregman response function, the ground truth (Grosse et al. 2023, Eq. 7–9).

For one training example z the objective is

    Q(θ) = (1/N) Σ_i D(h(θ, x_i), h(θˢ, x_i)) + ε L(z, θ) + ½ Σ_ℓ λ_ℓ ‖θ_ℓ − θˢ_ℓ‖²,

with the Bregman divergence D of the loss (summed over the tokens of a sequence), and the same λ_ℓ
that the estimators use. Its minimiser is found by preconditioned L-BFGS (Nocedal 1980), many z side
by side, and one solve serves all queries. Nothing is taken on faith: the gradient at the end is
reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import grad, vmap

from influence.examples import Batch
from influence.validation.ggn import outputs_at
from influence.validation.layout import Layout

Vectors = Float[Tensor, "k p"]


@dataclass(frozen=True, slots=True)
class ProximalObjective:
    """Q of several training examples at once.

    Args:
        model: in evaluation mode, holding θˢ.
        layout: the attributed layers; all other parameters stay.
        data: all N training examples.
        dampings: λ_ℓ by layer.
        examples_at_once: of `data`, in one pass.
    """

    model: nn.Module
    layout: Layout
    data: Batch
    dampings: Mapping[str, float]
    examples_at_once: int = 1024

    @torch.no_grad()  # else parameters that are not attributed would record every evaluation
    def gradient(self, offsets: Vectors, extra: Batch, epsilon: float) -> Vectors:
        """∇Q at θˢ + offset; the training example of row k is example k of `extra`."""
        here = self.layout.current()
        num_examples = len(self.data.ids)
        total = self.layout.by_layer(self.dampings, here) * offsets
        for places in torch.arange(num_examples).split(self.examples_at_once):
            batch = self.data.select(places)
            before = outputs_at(self.model, batch, self.layout.parameters(here)).detach()

            def divergence(offset: Tensor, batch: Batch = batch, before: Tensor = before) -> Tensor:
                after = outputs_at(self.model, batch, self.layout.parameters(here + offset))
                return batch.likelihood.divergence(after, before).sum() / num_examples

            total = total + vmap(grad(divergence))(offsets)
        return total + epsilon * self._loss_gradients(here + offsets, extra)

    def _loss_gradients(self, parameters: Vectors, extra: Batch) -> Vectors:
        """∇L(z_k), each at its own parameters."""
        gradients = []
        for k in range(len(parameters)):
            batch = extra.select(torch.tensor([k]))

            def loss(at: Tensor, batch: Batch = batch) -> Tensor:
                outputs = outputs_at(self.model, batch, self.layout.parameters(at))
                return batch.likelihood.loss(outputs, batch.row_labels(batch.targets)).sum()

            gradients.append(grad(loss)(parameters[k]))
        return torch.stack(gradients)


@dataclass(frozen=True, slots=True)
class Response:
    """θ(ε) − θˢ of several training examples, and how well each solve converged.

    `residuals` are √(gᵀP⁻¹g) at the end over the same at θˢ, with g = ∇Q and P the preconditioner:
    where P is the Hessian, the error of the response in its energy norm, relative.
    """

    offsets: Vectors
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    num_evaluations: int


def respond(
    objective: ProximalObjective,
    precondition: Callable[[Vectors], Vectors],
    extra: Batch,
    epsilon: float,
    tolerance: float,
    max_evaluations: int,
) -> Response:
    """argmin Q − θˢ for each example of `extra`, from the linear response −ε P⁻¹∇L(z).

    Args:
        objective: Q.
        precondition: P⁻¹, near the inverse of the Hessian G + diag λ_ℓ.
        extra: the training examples z.
        epsilon: the weight of z; 1/N adds a copy.
        tolerance: of the residuals.
        max_evaluations: of ∇Q, at most; what has not converged by then is reported so.
    """

    def gradient_at(offsets: Vectors, problems: Int[Tensor, " k"]) -> Vectors:
        return objective.gradient(offsets, extra.select(problems), epsilon)

    here = objective.layout.current()
    everyone = torch.arange(len(extra.ids))
    at_rest = gradient_at(here.new_zeros(len(everyone), len(here)), everyone)
    linear = -precondition(at_rest)
    # A z whose gradient vanishes moves nothing, and is solved where it stands.
    scale = -(linear * at_rest).sum(dim=1)
    scale = scale.clamp(min=torch.finfo(here.dtype).tiny).sqrt()
    offsets, residuals, evaluations = minimise(
        gradient_at, precondition, linear, tolerance * scale, max_evaluations
    )
    residuals = residuals / scale
    return Response(offsets, residuals, residuals <= tolerance, evaluations + 1)


def minimise(
    gradient_at: Callable[[Vectors, Int[Tensor, " k"]], Vectors],
    precondition: Callable[[Vectors], Vectors],
    start: Vectors,
    tolerances: Float[Tensor, " k"],
    max_evaluations: int,
    history: int = 8,
) -> tuple[Vectors, Float[Tensor, " k"], int]:
    """Preconditioned L-BFGS on several independent problems side by side.

    Each problem has its own step and history.

    Args:
        gradient_at: gradients at points, one for each of the problems named beside them.
        precondition: the initial inverse Hessian P⁻¹.
        start: a point for each problem.
        tolerances: a problem is solved when √(gᵀP⁻¹g) is at most this.
        max_evaluations: calls of `gradient_at`, at most.
        history: pairs that a problem remembers.

    Returns:
        The points, √(gᵀP⁻¹g) there, and the number of calls.
    """
    x = start.clone()
    gradient = gradient_at(x, torch.arange(len(x)))
    natural = precondition(gradient)
    evaluations, pairs = 1, []
    while evaluations < max_evaluations:
        norms = (gradient * natural).sum(dim=1).clamp(min=0).sqrt()
        active = (norms > tolerances).nonzero()[:, 0]
        if not len(active):
            break
        g = gradient[active]
        remembered = [(s[active], y[active]) for s, y in pairs]
        direction = -_two_loops(remembered, g, precondition)
        # A history that does not descend is not used for that problem.
        descends = (direction * g).sum(dim=1) < 0
        direction = torch.where(descends[:, None], direction, -natural[active])
        moved, new, calls = _search(
            gradient_at, x[active], g, direction, active, max_evaluations - evaluations
        )
        evaluations += calls
        s, y = torch.zeros_like(x), torch.zeros_like(x)
        s[active], y[active] = moved - x[active], new - g
        pairs = [*pairs, (s, y)][-history:]
        x[active], gradient[active] = moved, new
        natural[active] = precondition(new)
    return x, (gradient * natural).sum(dim=1).clamp(min=0).sqrt(), evaluations


def _search(
    gradient_at: Callable[[Vectors, Int[Tensor, " k"]], Vectors],
    x: Vectors,
    gradient: Vectors,
    direction: Vectors,
    problems: Int[Tensor, " k"],
    max_calls: int,
) -> tuple[Vectors, Vectors, int]:
    """Steps along directions: the new points, their gradients, and the number of calls.

    A step is halved, for its own problem only, until the slope along it has fallen to at most 0.9
    of what it was, on either side (the strong curvature condition): near the optimum the values of
    the objective agree to all digits, and only gradients still tell.
    """
    slope = (direction * gradient).sum(dim=1).abs()
    step, moved, new = torch.ones_like(slope), x.clone(), gradient.clone()
    trying, calls = torch.arange(len(x)), 0
    while len(trying) and calls < max_calls:
        moved[trying] = x[trying] + step[trying, None] * direction[trying]
        new[trying] = gradient_at(moved[trying], problems[trying])
        calls += 1
        over = (direction[trying] * new[trying]).sum(dim=1).abs() > 0.9 * slope[trying]
        trying = trying[over]
        step[trying] /= 2
    return moved, new, calls


def _two_loops(
    pairs: Sequence[tuple[Vectors, Vectors]],
    gradient: Vectors,
    precondition: Callable[[Vectors], Vectors],
) -> Vectors:
    """H g with the L-BFGS inverse Hessian H; a problem's pairs without curvature are skipped."""
    q, used = gradient, []
    for s, y in reversed(pairs):
        sy = (s * y).sum(dim=1)
        rho = torch.where(sy > 0, 1 / sy, 0.0)
        alpha = rho * (s * q).sum(dim=1)
        q = q - alpha[:, None] * y
        used.append((s, y, rho, alpha))
    q = precondition(q)
    for s, y, rho, alpha in reversed(used):
        q = q + (alpha - rho * (y * q).sum(dim=1))[:, None] * s
    return q
