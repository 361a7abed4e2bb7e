"""The damped inverse in the Kronecker eigenbasis (Grosse et al. 2023, Eq. 21)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from influence.damping import Damping
from influence.eigenbasis import Eigen, EigenBasis


@dataclass(frozen=True, slots=True)
class EKFACBlock:
    """G ≈ (Q_A ⊗ Q_S) diag(Λ) (Q_A ⊗ Q_S)ᵀ for one layer; K-FAC is the same with other Λ."""

    basis: EigenBasis
    eigenvalues: Float[Tensor, "d_out d_in"]

    def solve(
        self, V: Float[Tensor, "*batch d_out d_in"], damping: Damping
    ) -> Float[Tensor, "*batch d_out d_in"]:
        """(G + λI)⁻¹V = Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ."""
        return self.basis.unrotate(self.solve_rotated(self.basis.rotate(V), damping))

    def solve_rotated(
        self, R: Float[Tensor, "*batch d_out d_in"], damping: Damping
    ) -> Float[Tensor, "*batch d_out d_in"]:
        """R ⊘ (Λ + λ): the same solve for a matrix that already is in the eigenbasis."""
        return R / (self.eigenvalues + damping.of(self.eigenvalues))


def kfac_eigenvalues(A: Eigen, S: Eigen, tokens_per_sequence: float) -> Float[Tensor, "d_out d_in"]:
    """Eigenvalues of K-FAC, T · (Λ_S ⊗ Λ_A): A and S are per token, G is per sequence."""
    return tokens_per_sequence * S.values.unsqueeze(1) * A.values
