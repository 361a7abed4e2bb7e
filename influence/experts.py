"""Mixtures of experts: each expert is layers of its own, fed by the tokens that are routed to it.

Models keep the weights of all experts fused, in parameters with an axis for the expert, which no
linear layer holds. Here they are taken apart: two `nn.Linear` an expert, over views of the fused
weights (nothing is copied), and a forward that computes what the fused one does. A token costs the
experts that it is routed to, no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Route:
    """Which tokens reach an expert.

    Attributes:
        rows: their places among all tokens of the batch, sequence after sequence, ascending.
        num_rows: how many tokens the batch has, padding included.
    """

    rows: Int[Tensor, " m"]
    num_rows: int

    def sequence_of(self, row: int, num_sequences: int) -> int:
        """The place in the batch of the sequence to which a routed row belongs."""
        return int(self.rows[row]) * num_sequences // self.num_rows

    def pack(
        self,
        a: Float[Tensor, "m i"],
        ds: Float[Tensor, "m o"],
        num_sequences: int,
    ) -> tuple[Float[Tensor, "n c i"], Float[Tensor, "n c o"], Int[Tensor, "n c"]]:
        """Rows by sequence, in as many columns as the sequence with most of them needs.

        Returns:
            Inputs and output gradients, zero where a sequence has no more rows, and the position
            in its sequence that each column is: −1 where there is none.
        """
        length = self.num_rows // num_sequences
        sequence = self.rows // length
        counts = torch.bincount(sequence, minlength=num_sequences)
        begins = counts.cumsum(0) - counts
        column = torch.arange(len(self.rows), device=self.rows.device) - begins[sequence]
        shape = num_sequences, int(counts.max())
        positions = self.rows.new_full(shape, -1)
        positions[sequence, column] = self.rows % length
        packed = []
        for side in (a, ds):
            packed.append(side.new_zeros(*shape, side.shape[1]))
            packed[-1][sequence, column] = side
        return packed[0], packed[1], positions


class RoutedLinear(nn.Linear):
    """A linear layer of one expert. The route only goes along, for whoever watches the layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # no weights of its own: these share the memory of the fused ones
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    def forward(
        self, input: Float[Tensor, "m i"], route: Route | None = None
    ) -> Float[Tensor, "m o"]:
        """As any linear layer."""
        return super().forward(input)


class Expert(nn.Module):
    """One expert: up, non-linearity, down. The names are those of the fused parameters."""

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()
        for name in _weight_names(fused):
            weight, bias = getattr(fused, name)[number], getattr(fused, f"{name}_bias", None)
            weight = weight.mT if fused.is_transposed else weight
            setattr(self, name, RoutedLinear(weight, None if bias is None else bias[number]))


class Experts(nn.Module):
    """The experts of one block, equal to the fused module that they are taken from.

    Args:
        fused: whose parameters are given up to this module; what is left of it is its
            non-linearity.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        up, down = _weight_names(fused)
        self.num_experts = len(getattr(fused, up))
        for number in range(self.num_experts):
            self.add_module(str(number), Expert(fused, number))
        for name in (up, down):
            delattr(fused, name)
            if hasattr(fused, f"{name}_bias"):
                delattr(fused, f"{name}_bias")
        self.up, self.down, self.fused = up, down, fused

    def forward(
        self,
        hidden_states: Float[Tensor, "rows d"],
        top_k_index: Int[Tensor, "rows k"],
        top_k_weights: Float[Tensor, "rows k"],
    ) -> Float[Tensor, "rows d"]:
        """Σ of the chosen experts' outputs, weighted by the router."""
        total = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)  # stable: each expert's tokens stay in their order
        counts, tokens = self._counts(chosen), order // top_k_index.shape[1]
        of_experts = zip(order.split(counts), tokens.split(counts), strict=True)
        for number, (places, rows) in enumerate(of_experts):
            if len(places):
                expert, route = self.get_submodule(str(number)), Route(rows, len(hidden_states))
                hidden = getattr(expert, self.up)(hidden_states[rows], route)
                out = getattr(expert, self.down)(self._between(hidden), route)
                out = self._after(out) * top_k_weights.flatten()[places].unsqueeze(-1)
                total.index_add_(0, rows, out.to(total.dtype))
        return total

    def _counts(self, chosen: Int[Tensor, " choices"]) -> list[int]:
        """How often each expert was chosen; all alike on the device `meta`, where nobody knows."""
        if chosen.is_meta:
            each, left = divmod(len(chosen), self.num_experts)
            return [each + (number < left) for number in range(self.num_experts)]
        return torch.bincount(chosen, minlength=self.num_experts).tolist()

    def _between(self, hidden: Tensor) -> Tensor:
        """The non-linearity, and the gate where there is one, as the fused module has them."""
        fused: Any = self.fused
        return fused._apply_gate(hidden) if self.up == "gate_up_proj" else fused.act_fn(hidden)

    def _after(self, out: Tensor) -> Tensor:
        fused: Any = self.fused
        return fused.post_expert_norm(out) if getattr(fused, "has_post_expert_norm", 0) else out


def separate_experts(model: nn.Module) -> nn.Module:
    """The same model with every fused mixture of experts taken apart, in place.

    What it does not know as one (weights of experts in another form) it leaves: `find_layers` then
    names it among what is left out.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_fused(child):
                setattr(parent, name, Experts(child))
    return model


def routers(model: nn.Module) -> set[str]:
    """Names of the modules beside experts that choose among them, or weigh them.

    They are part of an MLP's block, but no MLP.
    """
    return {
        f"{name}.{child}{'.' * bool(inner)}{inner}".lstrip(".")
        for name, module in model.named_modules()
        if hasattr(module, "experts")
        for child, beside in module.named_children()
        if "gate" in child or "router" in child
        for inner, _ in beside.named_modules()
    }


def _weight_names(fused: nn.Module) -> Sequence[str]:
    return "gate_up_proj" if hasattr(fused, "gate_up_proj") else "up_proj", "down_proj"


def _is_fused(module: nn.Module) -> bool:
    """Whether a module is of the kind that transformers marks with `use_experts_implementation`
    (known by what that gives it: this package does not import it)."""
    weights = [getattr(module, name, None) for name in _weight_names(module)]
    return hasattr(module, "is_transposed") and all(
        isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights
    )
