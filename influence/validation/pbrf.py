"""The proximal Bregman response function, the ground truth (Grosse et al. 2023, Eq. 7–9).

For one training example z the objective is

    Q(θ) = (1/N) Σ_i D(h(θ, x_i), h(θˢ, x_i)) + ε L(z, θ) + ½ Σ_ℓ λ_ℓ ‖θ_ℓ − θˢ_ℓ‖²,

with the Bregman divergence D of the loss (summed over the tokens of a sequence), and the same λ_ℓ
that the estimators use. Its minimiser is found by preconditioned L-BFGS (Nocedal 1980), many z side
by side, and one solve serves all queries. Nothing is taken on faith: the gradient at the end is
reported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from influence.examples import Batch, ExampleBatch
from influence.validation.ggn import outputs_at
from influence.validation.layout import Layout
from influence.validation.lbfgs import Values, Vectors, minimise


@dataclass(frozen=True)
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
    def values(self, offsets: Vectors, extra: Batch, epsilon: float) -> Values:
        """Q and ∇Q at θˢ + offset; the training example of row k is example k of `extra`."""
        here = self.layout.current()
        num_examples = len(self.data.ids)
        pulled = self.layout.by_layer(self.dampings, here) * offsets
        loss, loss_gradient = self._losses(here + offsets, extra)
        value = (pulled * offsets).sum(dim=1) / 2 + epsilon * loss
        gradient = pulled + epsilon * loss_gradient
        for batch, before in self._before:

            def divergence(offset: Tensor, batch: Batch = batch, before: Tensor = before) -> Tensor:
                after = outputs_at(self.model, batch, self.layout.parameters(here + offset))
                return batch.likelihood.divergence(after, before).sum() / num_examples

            slope, far = vmap(grad_and_value(divergence))(offsets)
            value, gradient = value + far, gradient + slope
        return value, gradient

    @cached_property
    def _before(self) -> list[tuple[Batch, Tensor]]:
        """Batches of `data`, with their outputs at θˢ."""
        parts = torch.arange(len(self.data.ids)).split(self.examples_at_once)
        parameters = self.layout.parameters(self.layout.current())
        batches = [self.data.select(places) for places in parts]
        return [(batch, outputs_at(self.model, batch, parameters)) for batch in batches]

    def _losses(self, parameters: Vectors, extra: Batch) -> Values:
        """L(z_k) and ∇L(z_k), each at its own parameters."""

        def loss(at: Tensor, batch: Batch) -> Tensor:
            outputs = outputs_at(self.model, batch, self.layout.parameters(at))
            return batch.likelihood.loss(outputs, batch.row_labels(batch.targets)).sum()

        if isinstance(extra, ExampleBatch):

            def one(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
                ids = extra.ids[:1]  # no example is told from another by its id here
                return loss(at, ExampleBatch(ids, x[None], y[None], extra.likelihood))

            gradients, losses = vmap(grad_and_value(one))(parameters, extra.inputs, extra.targets)
            return losses, gradients
        # Which rows carry a loss differs between sequences, so these go one by one.
        alone = [extra.select(torch.tensor([k])) for k in range(len(parameters))]
        found = [grad_and_value(loss)(a, batch) for a, batch in zip(parameters, alone, strict=True)]
        return torch.stack([value for _, value in found]), torch.stack(
            [slope for slope, _ in found]
        )


@dataclass(frozen=True, slots=True)
class Response:
    """θ(ε) − θˢ of several training examples, and how well each solve converged.

    `residuals` are √(gᵀP⁻¹g) at the end over the same at θˢ, with g = ∇Q and P the preconditioner:
    where P is the Hessian, the error of the response in its energy norm, relative. Of a network
    with kinks (ReLU) the minimum may lie on one, where no residual is small.
    """

    offsets: Vectors
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    evaluations: Int[Tensor, " k"]


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
        max_evaluations: of each z, at most; what has not converged by then is reported so.
    """

    def values_at(offsets: Vectors, problems: Int[Tensor, " k"]) -> Values:
        return objective.values(offsets, extra.select(problems), epsilon)

    here = objective.layout.current()
    everyone = torch.arange(len(extra.ids))
    _, at_rest = values_at(here.new_zeros(len(everyone), len(here)), everyone)
    linear = -precondition(at_rest)
    scale = -(linear * at_rest).sum(dim=1)
    scale = scale.clamp(min=torch.finfo(here.dtype).tiny).sqrt()
    # A z whose gradient is no more than rounding beside the largest moves nothing, and is solved
    # where it stands: no step makes such a gradient smaller.
    rounding = 8 * torch.finfo(here.dtype).eps * scale.max()
    scale = scale.clamp(min=rounding / tolerance)
    found = minimise(values_at, precondition, linear, tolerance * scale, max_evaluations - 1)
    residuals = found.norms / scale
    return Response(found.points, residuals, residuals <= tolerance, found.evaluations + 1)
