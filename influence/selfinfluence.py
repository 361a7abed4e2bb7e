"""Self-influence: what a sequence does to its own loss, and how far it stands out.

One more copy of z moves log p(z) by (1/N) ∇L(z)ᵀ (G + λI)⁻¹ ∇L(z) nats. In the eigenbasis the form
is a weighted sum of squares, so no gradient is rotated back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.capture import LayerIO
from influence.damping import Damping
from influence.eigenbasis import RotatedInputs
from influence.ekfac import EKFACBlock
from influence.examples import Batch
from influence.layers import Layer
from influence.objectives import training_loss
from influence.passes import check_finite_layers, run_pass
from influence.solver import Unreached


@dataclass
class SelfInfluence:
    """∇Lᵀ(G + λI)⁻¹∇L, layer by layer.

    Args:
        solvers: the EK-FAC of each layer.
        damping: the rule for λ.
    """

    solvers: Mapping[str, EKFACBlock | Unreached]
    damping: Damping
    _weights: dict[str, Tensor] = field(default_factory=dict, init=False)

    def of(
        self, batch: Batch, layer: Layer, io: LayerIO | None, shared: RotatedInputs | None = None
    ) -> Float[Tensor, " n"]:
        """Of one layer, whether finite or not; 0 where it did not run."""
        solver = self.solvers[layer.name]
        if io is None or isinstance(solver, Unreached):  # an idle expert
            return solver.eigenvalues.new_zeros(len(batch.ids))
        if layer.name not in self._weights:
            ones = torch.ones_like(solver.eigenvalues)
            self._weights[layer.name] = solver.solve_rotated(ones, self.damping).flatten()
        weights = self._weights[layer.name]
        parts = solver.basis.rotated_gradients(io, shared)
        return torch.cat([part.square_().flatten(1) @ weights for part in parts])


def side_by_side(
    forms: Iterable[Float[Tensor, " n"]], layers: Sequence[Layer], batch: Batch
) -> Float[Tensor, "n l"]:
    """What `SelfInfluence.of` found, side by side where the batch is.

    Raises:
        NonFiniteSequenceError: naming layer and sequence.
    """
    found = torch.stack([form.to(batch.ids.device) for form in forms], dim=-1)
    check_finite_layers(found, layers, batch)
    return found


def stream_self(
    model: nn.Module,
    layers: Sequence[Layer],
    solvers: Mapping[str, EKFACBlock | Unreached],
    damping: Damping,
    batches: Iterable[Batch],
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n l"]]]:
    """∇Lᵀ(G + λI)⁻¹∇L of each sequence, per layer in the order of `layers`.

    Yields:
        The batch's ids, and the forms in the dtype of the pass: positive, not divided by N. Since
        f = −L here, the influence is `influence(−form, N)`.

    Raises:
        NonFiniteSequenceError: naming layer and sequence, instead of a number that is not finite.
    """
    selves = SelfInfluence(solvers, damping)
    for batch in batches:
        ios = run_pass(model, layers, batch, training_loss)
        shared = RotatedInputs()
        forms = [selves.of(batch, each, ios.get(each.name), shared) for each in layers]
        del ios, shared  # what a pass captured must not stay while the next one runs
        yield batch.ids, side_by_side(forms, layers, batch)
