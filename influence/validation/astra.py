"""ASTRA: EK-FAC as the preconditioner of stochastic iterations (Wang et al. 2025).

The first step from 0 with step size 1 is the EK-FAC answer; the iterations start there and remove
its bias, at the price of a few passes over the data. Steps carry momentum (Nesterov 1983), and the
answer is the mean of the second half of them: minibatch noise does not vanish by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.solver import Blocks, Solver
from influence.validation.ggn import GaussNewton, Vectors, top_eigenvalue
from influence.validation.lissa import minibatches

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

        def precondition(r: Vectors) -> Vectors:
            return layout.vector(self.preconditioner.solve(layout.blocks(r), dampings))

        alpha = self.step_size(damping, precondition)
        examples = minibatches(self.curvature.num_examples, self.batch, self.seed)
        theta = precondition(v)
        velocity, mean = torch.zeros_like(v), torch.zeros_like(v)
        first = self.num_iterations // 2
        for step in range(self.num_iterations):
            ahead = theta + MOMENTUM * velocity
            residual = self.curvature.product(ahead, next(examples)) + damping * ahead - v
            velocity = MOMENTUM * velocity - alpha * precondition(residual)
            theta = theta + velocity
            if step >= first:
                mean = mean + theta
        return layout.blocks(mean / (self.num_iterations - first) if self.num_iterations else theta)

    def step_size(self, damping: Tensor, precondition: Callable[[Vectors], Vectors]) -> float:
        """1 / σ_max of the preconditioned system of a minibatch, at most 1."""
        places = next(minibatches(self.curvature.num_examples, self.batch, self.seed))

        def preconditioned(x: Vectors) -> Vectors:
            return precondition(self.curvature.product(x, places) + damping * x)

        return min(1.0, 1 / top_eigenvalue(preconditioned, damping, self.seed, 0.05, 20))
