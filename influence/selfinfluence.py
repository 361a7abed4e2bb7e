"""Self-influence: what a sequence does to its own loss, and how far it stands out.

One more copy of z moves log p(z) by (1/N) ∇L(z)ᵀ (G + λI)⁻¹ ∇L(z) nats. In the eigenbasis the form
is a weighted sum of squares, so no gradient is rotated back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.damping import Damping
from influence.ekfac import EKFACBlock
from influence.examples import Batch
from influence.layers import Layer
from influence.objectives import training_loss
from influence.passes import check_finite, run_pass


def stream_self(
    model: nn.Module,
    layers: Sequence[Layer],
    solvers: Mapping[str, EKFACBlock],
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
    weights: dict[str, Tensor] = {}
    for batch in batches:
        ios = run_pass(model, layers, batch, training_loss)
        columns = []
        for layer in layers:
            solver = solvers[layer.name]
            if layer.name not in ios:  # an idle expert
                columns.append(solver.eigenvalues.new_zeros(len(batch.ids)))
                continue
            if layer.name not in weights:
                ones = torch.ones_like(solver.eigenvalues)
                weights[layer.name] = solver.solve_rotated(ones, damping).flatten()
            squares = solver.basis.rotate_gradient(ios[layer.name]).square_()
            columns.append(squares.flatten(1) @ weights[layer.name])
            check_finite(columns[-1], layer.name, batch)
        yield batch.ids, torch.stack(columns, dim=-1)
