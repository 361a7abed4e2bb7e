"""LiSSA: the inverse as a truncated Neumann series with minibatches (Agarwal et al. 2017; Koh and
Liang 2017; Grosse et al. 2023, Eq. 10)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from influence.solver import Blocks
from influence.validation.ggn import GaussNewton, Vectors, top_eigenvalue, trace
from influence.validation.minibatches import minibatches, worst_eigenvalue

GROWTH = 10.0  # times what a convergent series can reach: past it, the series diverges


@dataclass(frozen=True, slots=True)
class Schedule:
    """α, depth J and batch size of a series, and what it was chosen from.

    `truncation` is 1 / (αJ): stopping at J acts like that much more damping. `top` and `trace` are
    of G, `worst` is the largest top eigenvalue of a minibatch.
    """

    scale: float
    depth: int
    batch: int
    trace: float
    top: float
    worst: float

    @property
    def truncation(self) -> float:
        """1 / (αJ), to be compared with λ."""
        return 1 / (self.scale * self.depth)


def schedule(
    curvature: GaussNewton, dampings: Mapping[str, float], depth: int, batch: int, seed: int
) -> Schedule:
    """α from the spectrum of G, so that the series does not diverge.

    The mean series converges for α (σ_max + λ) ≤ 1. A minibatch of b adds noise whose second
    moment is bounded by G · tr G / b where examples have about equal traces, which asks for
    α (σ_max + tr G / b + λ) ≤ 1 (Klochkov and Liu 2024 argue from the same two numbers). Where
    they do not, some minibatch has a larger eigenvalue of its own, and that one counts: no step
    with α (σ + λ) ≤ 1 lengthens a vector.
    """
    like = curvature.layout.current()
    batch = min(batch, curvature.num_examples)
    top = top_eigenvalue(curvature.product, like, seed)
    total = trace(curvature, like, num_probes=8, seed=seed)
    worst = worst_eigenvalue(curvature.product, like, curvature.num_examples, batch, seed)
    scale = 1 / (max(top + total / batch, worst) + max(dampings.values()))
    return Schedule(scale, depth, batch, total, top, worst)


@dataclass(frozen=True, slots=True)
class LiSSA:
    """α r_J of r_j = v + (I − α(G̃_j + λ)) r_{j−1}, r_0 = v, each G̃_j from a fresh minibatch.

    Raises (by `solve`):
        ValueError: if the series diverges, saying by how much α is too large.
    """

    curvature: GaussNewton
    schedule: Schedule
    seed: int

    def solve(self, V: Blocks, dampings: Mapping[str, float]) -> dict[str, Tensor]:
        """(G + diag λ_ℓ)⁻¹V."""
        layout = self.curvature.layout
        *_, last = self.iterates(layout.vector(V), dampings)
        return layout.blocks(last)

    def iterates(self, v: Vectors, dampings: Mapping[str, float]) -> Iterator[Vectors]:
        """α r_j for j = 1, 2, … J: the answer of every depth, from one run."""
        layout, alpha = self.curvature.layout, self.schedule.scale
        damping = layout.by_layer(dampings, v)
        bound = GROWTH * v.norm(dim=1) / (alpha * min(dampings.values()))
        r = v
        examples = minibatches(self.curvature.num_examples, self.schedule.batch, self.seed)
        for step in range(1, self.schedule.depth + 1):
            applied = self.curvature.product(r, next(examples)) + damping * r
            r = v + r - alpha * applied
            if not bool((r.norm(dim=1) <= bound).all()):
                self._explain(step, float(r.norm(dim=1).max() / v.norm(dim=1).max()))
            yield alpha * r

    def _explain(self, step: int, growth: float) -> None:
        plan = self.schedule
        most = 1 / max(plan.top + plan.trace / plan.batch, plan.worst)
        remedy = "lower α" if plan.scale > most else "raise the damping or the batch"
        raise ValueError(
            f"LiSSA diverges: after {step} steps ‖r‖ is {growth:.3g}‖v‖ with α = {plan.scale:.3g}; "
            f"G has trace {plan.trace:.3g} and top eigenvalue {plan.top:.3g}, a batch of "
            f"{plan.batch} up to {plan.worst:.3g}, which asks for α ≤ {most:.3g}; {remedy}"
        )
