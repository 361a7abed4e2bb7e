"""The exact Gauss-Newton matrix G = mean Jᵀ H_ŷ J (Grosse et al. 2023, Eq. 9), never formed.

G couples all layers. A product costs about three backward passes; a system is solved by
preconditioned conjugate gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.examples import Batch
from influence.solver import Blocks, Solver
from influence.validation.layout import Layout

Vectors = Float[Tensor, "k p"]
Operator = Callable[[Vectors], Vectors]
Preconditioner = Callable[[Mapping[str, float]], Operator]  # of the dampings λ_ℓ by layer


def outputs_at(
    model: nn.Module, batch: Batch, parameters: Mapping[str, Tensor]
) -> Float[Tensor, "m c"]:
    """The rows of outputs that carry a loss, with some parameters replaced."""
    # Of the attention kernels, only the plain one has forward-mode derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        output = functional_call(model, dict(parameters), (batch.inputs,))
    return batch.rows(output if isinstance(output, Tensor) else output.logits)


def curvature_product(model: nn.Module, layout: Layout, batch: Batch, V: Vectors) -> Vectors:
    """Σ_n J_nᵀ H_ŷ J_n v over the examples of a batch, for each of the vectors.

    J v is the transpose of u ↦ Jᵀu, which is linear: reverse mode twice. Forward mode would cost
    the same, but its levels are shared by all threads of a process, which may not use it at once.
    """

    def outputs(parameters: Mapping[str, Tensor]) -> Tensor:
        return outputs_at(model, batch, parameters)

    values, pull_back, *_ = vjp(outputs, layout.parameters(layout.current()))

    def pulled_back(u: Tensor) -> Tensor:
        return layout.from_parameters(pull_back(u)[0])

    push_forward = vjp(pulled_back, torch.zeros_like(values))[1]
    tangents = batch.likelihood.curvature(values, vmap(lambda v: push_forward(v)[0])(V))
    return vmap(pulled_back)(tangents)


@dataclass(frozen=True, slots=True)
class GaussNewton:
    """G of a model over all of its training data.

    Args:
        model: in evaluation mode, with θ^s.
        layout: the attributed layers.
        data: all training examples, as one batch.
        examples_at_once: examples of one pass; no result depends on it but for rounding.
        vectors_at_once: vectors of one pass.
    """

    model: nn.Module
    layout: Layout
    data: Batch
    examples_at_once: int = 1024
    vectors_at_once: int = 16

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.data.ids)

    @torch.no_grad()  # else parameters that are not attributed would record every product
    def product(self, V: Vectors, examples: Int[Tensor, " b"] | None = None) -> Vectors:
        """G v, the mean over all examples, or over those at some places."""
        if examples is None:
            examples = torch.arange(self.num_examples)
        total = torch.zeros_like(V)
        for places in examples.split(self.examples_at_once):
            batch = self.data.select(places)
            for start in range(0, len(V), self.vectors_at_once):
                rows = slice(start, start + self.vectors_at_once)
                total[rows] += curvature_product(self.model, self.layout, batch, V[rows])
        return total / len(examples)


@dataclass(frozen=True, slots=True)
class Solution:
    """Of a linear system for several right sides; residuals relative to the right sides' norms."""

    x: Vectors
    num_iterations: int
    residuals: Float[Tensor, " k"]
    converged: bool


def conjugate_gradients(
    operator: Operator,
    b: Vectors,
    precondition: Operator,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve operator(x) = b from x = 0, all right sides side by side (Hestenes and Stiefel 1952).

    Stops when every ‖b − operator(x)‖ ≤ tolerance · ‖b‖; `operator` and `precondition` are
    symmetric and positive definite.
    """
    norms = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z, (r * z).sum(dim=1)
    iterations = 0
    while iterations < max_iterations and bool((r.norm(dim=1) > tolerance * norms).any()):
        applied = operator(p)
        curvature = (p * applied).sum(dim=1)
        # A column that is solved exactly has p = 0, and stays.
        alpha = torch.where(curvature > 0, rz / curvature, 0.0)
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * applied
        z = precondition(r)
        rz, before = (r * z).sum(dim=1), rz
        p = z + torch.where(before > 0, rz / before, 0.0)[:, None] * p
        iterations += 1
    residuals = r.norm(dim=1) / norms
    return Solution(x, iterations, residuals, bool((residuals <= tolerance).all()))


def preconditioner_of(solver: Solver, layout: Layout) -> Preconditioner:
    """Any estimator, EK-FAC say, as the preconditioner of the exact solve."""

    def factored(dampings: Mapping[str, float]) -> Operator:
        return lambda r: layout.vector(solver.solve(layout.blocks(r), dampings))

    return factored


@dataclass(frozen=True, slots=True)
class ExactGaussNewton:
    """(G + diag λ_ℓ)⁻¹ with the exact G of all layers together, by conjugate gradients.

    `preconditioner` is asked once a solve: what it factors for the dampings serves all iterations.

    Raises (by `solve`):
        ValueError: if `max_iterations` do not reach the tolerance; a truncated solve would pass
            for an exact one.
    """

    curvature: GaussNewton
    preconditioner: Preconditioner
    tolerance: float = 1e-8
    max_iterations: int = 1000

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """(G + diag λ_ℓ)⁻¹V."""
        layout = self.curvature.layout
        return layout.blocks(self.solution(layout.vector(V), dampings).x)

    def solution(self, b: Vectors, dampings: Mapping[str, float]) -> Solution:
        """The same for vectors, with iterations and residuals."""
        layout = self.curvature.layout
        damping = layout.by_layer(dampings, b)
        solution = conjugate_gradients(
            lambda p: self.curvature.product(p) + damping * p,
            b,
            self.preconditioner(dampings),
            self.tolerance,
            self.max_iterations,
        )
        if not solution.converged:
            raise ValueError(
                f"conjugate gradients stopped at {self.max_iterations} iterations with a relative "
                f"residual of {solution.residuals.max():.2g}, above {self.tolerance:.2g}; allow "
                "more iterations, raise the damping, or run in float64"
            )
        return solution


def trace(curvature: GaussNewton, like: Tensor, num_probes: int, seed: int) -> float:
    """tr G by random signs (Hutchinson 1989)."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num_probes, curvature.layout.size), generator=generator)
    probes = (2 * signs - 1).to(like)
    return float((probes * curvature.product(probes)).sum(dim=1).mean())


def top_eigenvalue(
    operator: Operator,
    like: Float[Tensor, " p"],
    seed: int,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
) -> float:
    """The largest eigenvalue of an operator with real eigenvalues, by subspace iteration.

    A single vector would settle on the second eigenvalue for a while, and stop there.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(min(8, len(like)), len(like), generator=generator, dtype=torch.float64)
    found = 0.0
    for _ in range(max_iterations):
        v = torch.linalg.qr(v.T)[0].T.to(like)
        applied = operator(v)
        within = (applied @ v.T).double()
        before, found = found, float(torch.linalg.eigvals(within).real.max())
        if abs(found - before) <= tolerance * found:
            break
        v = applied
    return found
