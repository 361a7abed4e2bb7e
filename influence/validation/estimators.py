"""The curvature that all estimators share: one fit, and what each makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.damping import Damping
from influence.eigenbasis import Eigen, EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock, kfac_eigenvalues
from influence.examples import Batch
from influence.factors import Factors, fit_factors
from influence.layers import Layer
from influence.solver import Blockwise, GradientDot, Unreached
from influence.spectrum import Spectrum, fit_spectra

LABELS_APART = 1_000_003  # between the seeds of draws that must be independent


@dataclass(frozen=True, slots=True)
class Curvature:
    """EK-FAC of every layer, fitted on all given examples; other estimators are cut from it.

    `positions` is how many loss-carrying positions an example has, on average, by layer: K-FAC's
    factors are per position, and G is per example. An expert that no example reached is in none.
    """

    layers: tuple[Layer, ...]
    eigens: Mapping[str, tuple[Eigen, Eigen]]
    ekfac: Mapping[str, EKFACBlock]
    positions: Mapping[str, float]

    @property
    def solvers(self) -> dict[str, EKFACBlock | Unreached]:
        """EK-FAC of every layer, also of experts that no example reached."""
        like = next(iter(self.ekfac.values())).eigenvalues
        return {
            layer.name: self.ekfac[layer.name]
            if layer.name in self.ekfac
            else Unreached(like.new_zeros(layer.d_out, layer.d_in))
            for layer in self.layers
        }

    def dampings(self, damping: Damping) -> dict[str, float]:
        """λ_ℓ, from the corrected eigenvalues: one damping for all estimators."""
        return {name: damping.of(block.eigenvalues) for name, block in self.ekfac.items()}

    def kfac(self) -> dict[str, EKFACBlock]:
        """The same eigenbases with uncorrected eigenvalues T · Λ_S ⊗ Λ_A."""
        return {
            name: EKFACBlock(block.basis, kfac_eigenvalues(A, S, self.positions[name]).to(like))
            for name, block in self.ekfac.items()
            for A, S in [self.eigens[name]]
            for like in [block.eigenvalues]
        }


def fit_curvature(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    seed: int,
    draws: int = 1,
    blocks: int = 1,
) -> Curvature:
    """A, S, their eigenbases and Λ, with labels sampled from the model.

    Args:
        model: in evaluation mode.
        layers: the attributed layers.
        batches: the examples.
        seed: of the labels.
        draws: labels sampled for each position; more cost more passes and lower the noise.
        blocks: O of App. A of the paper: A and S are cut into O diagonal blocks each.
    """
    seeds = [seed + LABELS_APART * draw for draw in range(2 * draws)]
    factors = reduce(add, [fit_factors(model, layers, batches, each) for each in seeds[:draws]])
    eigens = _eigens(layers, factors, blocks)
    parameter = next(model.parameters())
    bases = {
        name: EigenBasis(A.vectors, S.vectors).to(parameter.dtype, S.vectors.device)
        for name, (A, S) in eigens.items()
    }
    spectra = _spectra(model, layers, bases, batches, seeds[draws:])
    num_examples = draws * sum(len(batch.ids) for batch in batches)
    return Curvature(
        tuple(layers),
        eigens,
        {
            layer.name: EKFACBlock(
                bases[layer.name], spectra[layer.name].values.to(layer.device, parameter.dtype)
            )
            for layer in layers
            if not (layer.is_routed and spectra[layer.name].is_zero)
        },
        {
            name: covariance.num_tokens / num_examples
            for name, covariance in factors.outputs.items()
        },
    )


def _eigens(
    layers: Sequence[Layer], factors: Factors, blocks: int
) -> dict[str, tuple[Eigen, Eigen]]:
    """Of A and S of every layer that has them; a shared A is decomposed once."""
    groups = {
        group: eigendecompose_blocks(covariance.value, blocks, f"A/{group}")
        for group, covariance in factors.inputs.items()
    }
    return {
        name: (
            groups[layer.input_group],
            eigendecompose_blocks(factors.outputs[name].value, blocks, f"S/{name}"),
        )
        for layer in layers
        for name in [layer.name]
        if name in factors.outputs or not layer.is_routed
    }


def fit_diagonal(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], seed: int, draws: int = 1
) -> dict[str, EKFACBlock]:
    """The diagonal Fisher matrix: Λ in the basis of the parameters themselves."""
    parameter = next(model.parameters())
    bases = {
        layer.name: EigenBasis(torch.eye(layer.d_in), torch.eye(layer.d_out)).to(
            parameter.dtype, parameter.device
        )
        for layer in layers
    }
    seeds = [seed + LABELS_APART * draw for draw in range(draws, 2 * draws)]
    spectra = _spectra(model, layers, bases, batches, seeds)
    return {
        name: EKFACBlock(bases[name], spectrum.values.to(parameter))
        for name, spectrum in spectra.items()
    }


def gradient_dot(layers: Sequence[Layer]) -> Blockwise:
    """(G + λ)⁻¹ replaced by the identity."""
    return Blockwise({layer.name: GradientDot() for layer in layers})


def eigendecompose_blocks(matrix: Float[Tensor, "d d"], blocks: int, name: str) -> Eigen:
    """Eigendecomposition of the `blocks` diagonal blocks of a matrix (Grosse et al. 2023, App. A).

    The eigenvectors come back as one matrix, block-diagonal; sizes differ by one at most. The
    coordinate of a bias belongs to the last block. A matrix of fewer rows is cut into its rows.
    """
    if blocks < 1:
        raise ValueError(f"{blocks} blocks; give 1 or more")
    parts = [
        eigendecompose(matrix[rows][:, rows], name)
        for rows in torch.arange(len(matrix), device=matrix.device).tensor_split(
            min(blocks, len(matrix))
        )
    ]
    return Eigen(
        torch.cat([part.values for part in parts]),
        torch.block_diag(*[part.vectors for part in parts]),
    )


def _spectra(
    model: nn.Module,
    layers: Sequence[Layer],
    bases: Mapping[str, EigenBasis],
    batches: Sequence[Batch],
    seeds: Sequence[int],
) -> dict[str, Spectrum]:
    """Λ from several draws of labels."""
    draws = [fit_spectra(model, layers, bases, batches, seed) for seed in seeds]
    return {layer.name: reduce(add, [draw[layer.name] for draw in draws]) for layer in layers}
