"""Slow and obvious: curvature, responses and series from their definitions, by torch alone.

An example is run alone, through the real weights. Everything is one dense vector or matrix over the
parameters of some modules: module after module, row after row of (W b), the weight of one output
flattened and its bias behind it. Labels are given, or *all* of them are enumerated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


# ---- losses of one row of outputs, in nats


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """−log softmax(output)[target]."""
    return output.exp().sum().log() - output[int(target)]


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """½‖output − target‖²."""
    return ((output - target) ** 2).sum() / 2


def loss_hessian(loss: Loss, output: Tensor, target: Tensor) -> Any:
    """The Hessian of the loss by the outputs, [c, c]."""
    return torch.autograd.functional.hessian(lambda y: loss(y, target), output)


def bregman(loss: Loss, output: Tensor, before: Tensor, target: Tensor) -> Tensor:
    """L(ŷ) − L(ŷˢ) − ∇L(ŷˢ)ᵀ(ŷ − ŷˢ), word for word (Grosse et al. 2023, Eq. 8)."""
    at = before.detach().requires_grad_()
    slope = torch.autograd.grad(loss(at, target), at)[0]
    return loss(output, target) - loss(before, target) - torch.dot(slope, output - before)


# ---- one example


@dataclass(frozen=True)
class Example:
    """`run()` gives the rows of outputs [m, c] that carry a loss, `targets` one target a row."""

    run: Callable[[], Tensor]
    targets: Sequence[Tensor]
    loss: Loss


def example_loss(example: Example, targets: Sequence[Tensor] | None = None) -> Tensor:
    """Σ over rows; the example's own targets by default."""
    targets = example.targets if targets is None else targets
    rows = zip(example.run(), targets, strict=True)
    return torch.stack([example.loss(y, t) for y, t in rows]).sum()


# ---- vectors over the parameters of modules


def flatten(modules: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
    """Tensors shaped like the parameters, weight and bias of each module in turn, as one vector."""
    left, rows = list(tensors), []
    for module in modules:
        weight = left.pop(0)
        if type(module).__name__ == "Conv1D":
            weight = weight.T
        bias = None if module.bias is None else left.pop(0)
        for o in range(len(weight)):
            rows.append(weight[o].reshape(-1))
            if bias is not None:
                rows.append(bias[o].reshape(1))
    return torch.cat(rows)


def parameters(modules: Sequence[Any]) -> list[Tensor]:
    """Weight and bias of each module in turn."""
    return [
        parameter
        for module in modules
        for parameter in (module.weight, module.bias)
        if parameter is not None
    ]


def theta(modules: Sequence[Any]) -> Tensor:
    """All parameters as one vector; autograd sees through it."""
    return flatten(modules, parameters(modules))


def gradient(scalar: Tensor, modules: Sequence[Any]) -> Tensor:
    """d scalar / d θ, [p]."""
    found = torch.autograd.grad(
        scalar, parameters(modules), retain_graph=True, materialize_grads=True
    )
    return flatten(modules, found)


def add(modules: Sequence[Any], vector: Tensor) -> None:
    """θ ← θ + vector, one number after the other."""
    left = vector.clone()
    with torch.no_grad():
        for module in modules:
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            for o in range(len(weight)):
                size = weight[o].numel()
                weight[o] += left[:size].reshape(weight[o].shape)
                left = left[size:]
                if module.bias is not None:
                    module.bias[o] += left[0]
                    left = left[1:]
    assert len(left) == 0


# ---- curvature, dense


def jacobian(example: Example, modules: Sequence[Any]) -> Tensor:
    """d outputs / d θ, [m, c, p]."""
    rows = []
    for output in example.run():
        rows.append(torch.stack([gradient(number, modules) for number in output]))
    return torch.stack(rows)


def gauss_newton(examples: Sequence[Example], modules: Sequence[Any]) -> Tensor:
    """G = mean over examples of Σ_rows Jᵀ H J (Grosse et al. 2023, Eq. 9), [p, p]."""
    total = torch.zeros(())
    for example in examples:
        outputs = example.run().detach()
        for J, output, target in zip(
            jacobian(example, modules), outputs, example.targets, strict=True
        ):
            total = total + J.T @ loss_hessian(example.loss, output, target) @ J
    return total / len(examples)


def fisher(examples: Sequence[Example], modules: Sequence[Any]) -> Tensor:
    """F = mean over examples of Σ_rows Σ_y p_y ∇log p_y ∇log p_yᵀ, all labels y enumerated."""
    total = torch.zeros(())
    for example in examples:
        for output in example.run():
            log_p = output.log_softmax(0)
            for y in range(len(log_p)):
                g = gradient(log_p[y], modules)
                total = total + log_p[y].exp().item() * torch.outer(g, g)
    return total / len(examples)


def damped_solve(G: Tensor, dampings: Tensor, V: Tensor) -> Tensor:
    """(G + diag λ)⁻¹ v of every row v of V."""
    return torch.linalg.solve(G + dampings.diag(), V.T).T


def neumann(G: Tensor, dampings: Tensor, alpha: float, v: Tensor, steps: int) -> Tensor:
    """α Σ_{j ≤ steps} (I − α(G + diag λ))ʲ v (Grosse et al. 2023, Eq. 10)."""
    M = torch.eye(len(G), dtype=G.dtype) - alpha * (G + dampings.diag())
    power, total = v, v
    for _ in range(steps):
        power = M @ power
        total = total + power
    return alpha * total


# ---- the proximal Bregman objective


def proximal_objective(
    examples: Sequence[Example],
    modules: Sequence[Any],
    extra: Example,
    epsilon: float,
    dampings: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Q and ∇Q at θˢ + offset, spelled out (Grosse et al. 2023, Eq. 7); the model is restored.

    Q = (1/N) Σ_i Σ_rows D(ŷ, ŷˢ) + ε L(z) + ½ Σ λ (θ − θˢ)².
    """
    with torch.no_grad():
        before = [example.run() for example in examples]
    at_rest = theta(modules).detach().clone()
    saved = [parameter.detach().clone() for parameter in parameters(modules)]
    add(modules, offset)
    Q = epsilon * example_loss(extra) + (dampings * (theta(modules) - at_rest) ** 2).sum() / 2
    for example, old_rows in zip(examples, before, strict=True):
        for new, old, target in zip(example.run(), old_rows, example.targets, strict=True):
            Q = Q + bregman(example.loss, new, old, target) / len(examples)
    found = gradient(Q, modules)
    with torch.no_grad():
        for parameter, value in zip(parameters(modules), saved, strict=True):
            parameter.copy_(value)
    return Q.detach(), found


# ---- inside one layer


def patches(module: Any, image: Tensor) -> Tensor:
    """Of one image [c, h, w], what the kernel lies on at each place, [places, c·k·k]."""
    (top, left), (down, across) = module.padding, module.stride
    (dy, dx), (height, width) = module.dilation, module.kernel_size
    channels, h, w = image.shape
    padded = image.new_zeros(channels, h + 2 * top, w + 2 * left)
    padded[:, top : top + h, left : left + w] = image
    rows = []
    for y in range(0, h + 2 * top - dy * (height - 1), down):
        for x in range(0, w + 2 * left - dx * (width - 1), across):
            rows.append(
                torch.stack(
                    [
                        padded[channel, y + dy * i, x + dx * j]
                        for channel in range(channels)
                        for i in range(height)
                        for j in range(width)
                    ]
                )
            )
    return torch.stack(rows)


def layer_io(module: Any, example: Example, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """ā [places, d_in] with the 1 of a bias, and dL/ds [places, o], of one example alone."""
    seen = {}
    handle = module.register_forward_hook(lambda _, args, out: seen.update(a=args[0], s=out))
    loss = example_loss(example, targets)
    handle.remove()
    ds = torch.autograd.grad(loss, seen["s"])[0][0]
    a = seen["a"][0].detach()
    if isinstance(module, torch.nn.Conv2d):
        a, ds = patches(module, a), ds.reshape(len(ds), -1).T
    elif a.ndim == 1:
        a, ds = a[None], ds[None]
    if module.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return a, ds


def kronecker_factors(
    module: Any, examples: Sequence[Example], drawn: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """A = mean ā āᵀ and S = mean ds dsᵀ over the places of all examples, for given labels."""
    A_terms, S_terms = [], []
    for example, targets in zip(examples, drawn, strict=True):
        for a, ds in zip(*layer_io(module, example, targets), strict=True):
            A_terms.append(torch.outer(a, a))
            S_terms.append(torch.outer(ds, ds))
    return torch.stack(A_terms).mean(0), torch.stack(S_terms).mean(0)
