"""ASTRA: EK-FAC as the preconditioner of stochastic iterations (Wang et al. 2025).

The first step from 0 with step size 1 is the EK-FAC answer; the iterations start there and remove
its bias, at the price of a few passes over the data. Steps carry momentum (Nesterov 1983), and the
answer is the mean of the second half of them: minibatch noise does not vanish by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.solver import Blocks, Solver
from influence.validation.ggn import (
    GaussNewton,
    Operator,
    Vectors,
    preconditioner_of,
    top_eigenvalue,
)
from influence.validation.minibatches import minibatches, worst_eigenvalue

MOMENTUM = 0.9


@dataclass(frozen=True, slots=True)
class ASTRA:
    """θ ← θ − α (Ĝ + λ)⁻¹ [(G̃ + λ)θ − v], with momentum and tail averaging.

    Args:
        curvature: the exact G, of which each step takes a minibatch.
        preconditioner: (Ĝ + λ)⁻¹, the EK-FAC.
        num_iterations: at most 200 in the published runs.
        batch: examples of a step.
        seed: of the minibatches.

    Raises (by `solve`):
        ValueError: if the iterations end further from a solution than they began.
    """

    curvature: GaussNewton
    preconditioner: Solver
    num_iterations: int
    batch: int
    seed: int

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """(G + diag λ_ℓ)⁻¹V."""
        layout = self.curvature.layout
        v = layout.vector(V)
        damping = layout.by_layer(dampings, v)
        precondition = preconditioner_of(self.preconditioner, layout)(dampings)
        theta = precondition(v)
        if not self.num_iterations:
            return layout.blocks(theta)
        alpha = self.step_size(damping, precondition)
        examples = minibatches(self.curvature.num_examples, self.batch, self.seed)
        start, velocity, mean = theta, torch.zeros_like(v), torch.zeros_like(v)
        first = self.num_iterations // 2
        for step in range(self.num_iterations):
            ahead = theta + MOMENTUM * velocity
            residual = self.curvature.product(ahead, next(examples)) + damping * ahead - v
            velocity = MOMENTUM * velocity - alpha * precondition(residual)
            theta = theta + velocity
            if step >= first:
                mean = mean + theta
        mean = mean / (self.num_iterations - first)
        self._check(v, start, mean, damping, precondition)
        return layout.blocks(mean)

    def step_size(self, damping: Tensor, precondition: Operator) -> float:
        """1 / (σ + (σ_b − σ) / (1 − momentum)), at most 1.

        σ is the top eigenvalue of the preconditioned system, σ_b the largest of a minibatch:
        momentum carries the noise of a step through 1 / (1 − momentum) of them.
        """

        def system(x: Vectors, examples: Int[Tensor, " b"] | None = None) -> Vectors:
            return precondition(self.curvature.product(x, examples) + damping * x)

        whole = top_eigenvalue(system, damping, self.seed, 0.05, 20)
        worst = worst_eigenvalue(
            system, damping, self.curvature.num_examples, self.batch, self.seed
        )
        return min(1.0, 1 / (whole + max(0.0, worst - whole) / (1 - MOMENTUM)))

    def _check(
        self, v: Vectors, start: Vectors, end: Vectors, damping: Tensor, precondition: Operator
    ) -> None:
        """Refuse an end that solves the system worse than the start did, and than 0 would."""

        def size(residual: Vectors) -> Float[Tensor, " k"]:
            return (residual * precondition(residual)).sum(dim=1).sqrt()

        def error(theta: Vectors) -> Float[Tensor, " k"]:
            return size(self.curvature.product(theta) + damping * theta - v)

        before, after = torch.maximum(error(start), size(v)), error(end)
        if not bool((after <= before).all()):  # NaN is not
            worst = (after / before).nan_to_num(torch.inf).max()
            raise ValueError(
                f"ASTRA diverges: after {self.num_iterations} steps its residual is {worst:.3g} "
                f"times that of the start; raise the batch (now {self.batch}) or the damping"
            )
