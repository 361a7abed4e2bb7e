"""A randomised Nyström approximation of G, for preconditioning (Frangella, Tropp and Udell 2023).

Where the attributed parameters outnumber the outputs, G has a low rank and a long null space, and
EK-FAC, whose eigenvalues are right in another basis, conditions it worse than λ alone. A sketch of
G finds its range; with more columns than the rank it is G itself, and every solve takes one step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.solver import Blocks
from influence.validation.ggn import GaussNewton, Operator, Vectors
from influence.validation.layout import Layout


@dataclass(frozen=True, slots=True)
class Nystrom:
    """G ≈ FᵀF with F of few rows; a `Solver`, and a preconditioner of the exact one."""

    layout: Layout
    F: Float[Tensor, "s p"]

    @classmethod
    def of(cls, curvature: GaussNewton, columns: int, seed: int) -> "Nystrom":
        """Sketch G with `columns` random vectors: that many products with G."""
        like = curvature.layout.current()
        generator = torch.Generator().manual_seed(seed)
        columns = min(columns, len(like))
        omega = torch.randn(columns, len(like), generator=generator, dtype=like.dtype)
        omega /= len(like) ** 0.5  # rows of a wide Gaussian matrix are nearly orthonormal
        if 2 * columns > len(like):
            omega = torch.linalg.qr(omega.T)[0].T.contiguous()
        sketch = curvature.product(omega)
        # The shift keeps the core positive definite where G's rank is below the sketch's.
        shift = torch.finfo(like.dtype).eps * float(sketch.norm()) * columns**0.5
        sketch = sketch + shift * omega
        core = (sketch @ omega.T).double()
        root = torch.linalg.cholesky((core + core.T) / 2)
        return cls(
            curvature.layout,
            torch.linalg.solve_triangular(root, sketch.double(), upper=False).to(like),
        )

    @property
    def tail(self) -> float:
        """The smallest eigenvalue found: about the largest of what the sketch leaves out of G."""
        inner = (self.F @ self.F.T).double()  # has the eigenvalues of FᵀF
        return max(0.0, float(torch.linalg.eigvalsh(inner)[0]))

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """(FᵀF + diag λ_ℓ)⁻¹V, by the Woodbury identity."""
        return self.layout.blocks(self.inverse(dampings).apply(self.layout.vector(V)))

    def preconditioner(self, dampings: Mapping[str, float]) -> Operator:
        """Of the exact solve: the damped inverse, factored once."""
        return self.inverse(dampings).apply

    def inverse(self, dampings: Mapping[str, float]) -> "Woodbury":
        """(FᵀF + diag λ_ℓ)⁻¹, factored once for many vectors."""
        damping = self.layout.by_layer(dampings, self.F[0])
        scaled = self.F / damping.sqrt()
        inner = (scaled @ scaled.T).double()
        inner = inner + torch.eye(len(inner), dtype=inner.dtype)
        root = torch.linalg.cholesky(inner)
        return Woodbury(
            torch.linalg.solve_triangular(root, self.F.double() / damping, upper=False).to(self.F),
            damping,
        )


@dataclass(frozen=True, slots=True)
class Woodbury:
    """diag(λ)⁻¹ − KᵀK."""

    K: Float[Tensor, "s p"]
    damping: Float[Tensor, " p"]

    def apply(self, V: Vectors) -> Vectors:
        """The inverse times vectors."""
        return V / self.damping - (V @ self.K.T) @ self.K
