"""The Kronecker eigenbasis Q_A ⊗ Q_S, eigenvectors in columns (Grosse et al. 2023, Eq. 18).

The paper's printed Eq. 20 and 21 have the eigenvectors in rows; `torch.linalg.eigh` gives columns.
This file owns the convention: no other file transposes a Q.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.capture import LayerIO
from influence.products import joined, product, products


@dataclass(frozen=True, slots=True)
class Eigen:
    """Eigenvalues in ascending order, eigenvectors in columns."""

    values: Float[Tensor, " d"]
    vectors: Float[Tensor, "d d"]


def eigendecompose(matrix: Float[Tensor, "d d"], name: str) -> Eigen:
    """Eigendecomposition in float64 of a symmetric matrix.

    Raises:
        ValueError: naming the factor, if it is not finite or does not converge.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"factor {name!r} holds NaN or infinity; the pass that fitted it overflowed: "
            "fit the factors again in float32"
        )
    matrix = matrix.double()
    try:
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    except RuntimeError as error:  # torch raises its LinAlgError, which is one
        raise ValueError(
            f"the eigendecomposition of factor {name!r} ({len(matrix)} × {len(matrix)}, trace "
            f"{matrix.trace():.3g}) did not converge; fit on more sequences"
        ) from error
    return Eigen(values, vectors)


@dataclass(frozen=True, slots=True)
class EigenBasis:
    """Eigenvectors of one layer's A and S, in columns."""

    Q_A: Float[Tensor, "d_in d_in"]
    Q_S: Float[Tensor, "d_out d_out"]

    def rotate(
        self, V: Float[Tensor, "*batch {self.d_out} {self.d_in}"]
    ) -> Float[Tensor, "*batch {self.d_out} {self.d_in}"]:
        """unvec((Q_A ⊗ Q_S)ᵀ vec V) = Q_Sᵀ V Q_A."""
        return product(product(self.Q_S.mT, V), self.Q_A)

    def unrotate(
        self, R: Float[Tensor, "*batch {self.d_out} {self.d_in}"]
    ) -> Float[Tensor, "*batch {self.d_out} {self.d_in}"]:
        """unvec((Q_A ⊗ Q_S) vec R) = Q_S R Q_Aᵀ."""
        return product(product(self.Q_S, R), self.Q_A.mT)

    def unrotate_outputs(
        self, left: Float[Tensor, "*batch {self.d_out} r"]
    ) -> Float[Tensor, "*batch {self.d_out} r"]:
        """Q_S times a left factor, for low-rank matrices that were truncated when rotated."""
        return product(self.Q_S, left)

    def unrotate_inputs(
        self, right: Float[Tensor, "*batch r {self.d_in}"]
    ) -> Float[Tensor, "*batch r {self.d_in}"]:
        """A right factor times Q_Aᵀ."""
        return product(right, self.Q_A.mT)

    def rotate_gradient(
        self, io: LayerIO, shared: "RotatedInputs | None" = None
    ) -> Float[Tensor, "n {self.d_out} {self.d_in}"]:
        """Q_Sᵀ (Σ_t ds [a; 1]ᵀ) Q_A of every sequence."""
        return joined(self.rotated_gradients(io, shared))

    def rotated_gradients(
        self, io: LayerIO, shared: "RotatedInputs | None" = None
    ) -> Iterator[Float[Tensor, "_ {self.d_out} {self.d_in}"]]:
        """The same in parts of the batch; a side is rotated before the sum over tokens or after, as
        is cheaper.

        `shared` holds the inputs of the layer before, if these were rotated.
        """
        num_positions = io.a.shape[1]
        outputs_first = self.rotates_outputs_first(num_positions)
        ds = product(io.ds, self.Q_S) if outputs_first else io.ds
        inputs = shared.find(self, io) if shared is not None else None
        if inputs is None and self.rotates_inputs_first(num_positions):
            inputs = self._rotated_inputs(io)
            if shared is not None:
                shared.keep(self, io, inputs)
        if inputs is not None:
            parts = products(ds.mT, inputs)
        else:
            parts = (product(LayerIO(io.a, ds, io.has_bias).gradient(), self.Q_A),)
        yield from parts if outputs_first else (product(self.Q_S.mT, part) for part in parts)

    def add_rotated_squares(
        self,
        into: Float[Tensor, "{self.d_out} {self.d_in}"],
        io: LayerIO,
        shared: "RotatedInputs | None" = None,
    ) -> None:
        """Add Σ_n (Q_Sᵀ (Σ_t ds [a; 1]ᵀ) Q_A)² in place, squared entry by entry.

        A sum of one term has a square that factors: of sequences of a single position no gradient
        is formed.
        """
        if io.a.shape[1] > 1:
            for part in self.rotated_gradients(io, shared):
                for rotated in part.to(into.dtype):
                    into.addcmul_(rotated, rotated)  # one pass over memory; squares take three
            return
        inputs, outputs = self._rotated_inputs(io), product(io.ds, self.Q_S)
        squares = (side[:, 0].to(into.dtype).square_() for side in (outputs, inputs))
        into.addmm_(next(squares).mT, next(squares))

    def _rotated_inputs(self, io: LayerIO) -> Float[Tensor, "n t {self.d_in}"]:
        """[a; 1]ᵀ Q_A of every position."""
        bias = self.Q_A[-1] if io.has_bias else None
        return product(io.a, self.Q_A[: io.a.shape[2]], bias)

    def rotates_inputs_first(self, num_positions: int) -> bool:
        """Whether T products with Q_A, one a token, cost less than d_out, one a row; where they
        cost the same, one product for all sequences runs faster than one for each."""
        return num_positions <= self.d_out

    def rotates_outputs_first(self, num_positions: int) -> bool:
        """Whether T products with Q_S, one a token, cost less than d_in, one a column, or the
        same."""
        return num_positions <= self.d_in

    @property
    def d_in(self) -> int:
        return self.Q_A.shape[0]

    @property
    def d_out(self) -> int:
        return self.Q_S.shape[0]

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "EigenBasis":
        """The same basis in the dtype and on the device of a pass."""
        return EigenBasis(self.Q_A.to(device, dtype), self.Q_S.to(device, dtype))


class RotatedInputs:
    """[a; 1]ᵀ Q_A of one layer, for the next ones that take the same input: k and v after q."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def find(self, basis: EigenBasis, io: LayerIO) -> Float[Tensor, "n t d_in"] | None:
        """The inputs kept, if they are these in this basis."""
        if self._last is None:
            return None
        a, Q_A, inputs = self._last
        # What is kept is alive, so that no other tensor can be where it is.
        same = Q_A is basis.Q_A and a.data_ptr() == io.a.data_ptr()
        return inputs if same and (a.shape, a.stride()) == (io.a.shape, io.a.stride()) else None

    def keep(self, basis: EigenBasis, io: LayerIO, inputs: Float[Tensor, "n t d_in"]) -> None:
        """In the place of those kept before."""
        self._last = io.a, basis.Q_A, inputs
