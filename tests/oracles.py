"""Slow and obvious: every quantity of `influence/` from its definition, sharing no code with it.

Loops over sequences, tokens and labels; autograd through the real weights; dense matrices. A
sequence is a pair (tokens, supervised) of 1-D tensors, run alone and unpadded; token t has a loss
if `supervised[t]`, and it is predicted at position t − 1. Labels are drawn by nobody here: either
they are given, or *all* of them are enumerated with their probabilities, which makes expectations
exact. `vec` stacks columns, as in Grosse et al. 2023, so that (A ⊗ S) vec V = vec(S V A).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Tokens = tuple[Tensor, Tensor]


# ---- matrices and vectors


def vec(V: Tensor) -> Tensor:
    """The columns of V, one below the other."""
    return torch.cat([V[:, column] for column in range(V.shape[1])])


def unvec(v: Tensor, num_rows: int) -> Tensor:
    """The matrix whose columns, one below the other, are v."""
    return torch.stack(list(v.split(num_rows)), dim=1)


# ---- losses and gradients of one sequence, through the real weights


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [t, v] of one sequence."""
    return model(tokens[None]).logits[0]


def targets(sequence: Tokens) -> list[int]:
    """The supervised t."""
    return [t for t, has_loss in enumerate(sequence[1].tolist()) if has_loss]


def log_probability(model: nn.Module, sequence: Tokens, labels: Tensor | None = None) -> Tensor:
    """Σ log p(label_t | tokens before t) over supervised t; labels are the tokens by default."""
    labels = sequence[0] if labels is None else labels
    output = logits(model, sequence[0])
    total = output.new_zeros(())
    for t in targets(sequence):
        total = total + output[t - 1].log_softmax(0)[labels[t]]
    return total


def weight_gradient(scalar: Tensor, module: nn.Module) -> Tensor:
    """d scalar / d (W b), [o, i + 1] with the bias in the last column, [o, i] without a bias."""
    names = ["weight"] if module.bias is None else ["weight", "bias"]
    grads = torch.autograd.grad(scalar, [getattr(module, n) for n in names], retain_graph=True)
    weight = grads[0].T if type(module).__name__ == "Conv1D" else grads[0]
    return weight if len(grads) == 1 else torch.cat([weight, grads[1][:, None]], dim=1)


def sequence_gradient(
    model: nn.Module, module: nn.Module, sequence: Tokens, labels: Tensor | None = None
) -> Tensor:
    """∇ log p of one sequence, [o, d_in]; the gradient of the loss is minus this."""
    return weight_gradient(log_probability(model, sequence, labels), module)


def label_gradients(
    model: nn.Module, module: nn.Module, sequence: Tokens
) -> list[tuple[float, Tensor]]:
    """(p_y, ∇ log p(y at t)) for every supervised t and *every* label y."""
    output = logits(model, sequence[0])
    found = []
    for t in targets(sequence):
        log_p = output[t - 1].log_softmax(0)
        found += [
            (log_p[y].exp().item(), weight_gradient(log_p[y], module)) for y in range(len(log_p))
        ]
    return found


# ---- one sequence seen from inside a layer


def watch(module: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `run` returns, and what went into `module` meanwhile, [t, ·], and came out, [.., ·]."""
    seen = {}
    handle = module.register_forward_hook(lambda _, args, out: seen.update(a=args[0], s=out))
    result = run()
    handle.remove()
    a = seen["a"].detach().flatten(0, -2)
    if module.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return result, a, seen["s"]


def layer_io(
    model: nn.Module, module: nn.Module, sequence: Tokens, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ā [t, d_in] with the 1 of a bias, and d log p / d s [t, o]."""
    log_p, a, s = watch(module, lambda: log_probability(model, sequence, labels))
    return a, torch.autograd.grad(log_p, s)[0].flatten(0, -2)


# ---- curvature


def kronecker_factors(
    model: nn.Module, module: nn.Module, sequences: Sequence[Tokens], labels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A = mean ā āᵀ, S = mean Ds Dsᵀ over positions with a loss, for given labels (Eq. 16)."""
    A_terms, S_terms = [], []
    for sequence, drawn in zip(sequences, labels, strict=True):
        a, ds = layer_io(model, module, sequence, drawn)
        for t in targets(sequence):
            A_terms.append(torch.outer(a[t - 1], a[t - 1]))
            S_terms.append(torch.outer(ds[t - 1], ds[t - 1]))
    return sum(A_terms) / len(A_terms), sum(S_terms) / len(S_terms)


def expected_kronecker_factors(
    model: nn.Module, module: nn.Module, sequences: Sequence[Tokens]
) -> tuple[Tensor, Tensor]:
    """A, and S with every label enumerated.

    Given the inputs, labels at different positions are independent and their score functions have
    mean zero, so the products of two positions' terms vanish in expectation.
    """
    A, S, num_tokens = 0, 0, 0
    for sequence in sequences:
        output, a, s = watch(module, lambda z=sequence: logits(model, z[0]))
        places = [t - 1 for t in targets(sequence)]
        for place in places:
            A = A + torch.outer(a[place], a[place])
            num_tokens += 1
            log_p = output[place].log_softmax(0)
            for y in range(len(log_p)):
                ds = torch.autograd.grad(log_p[y], s, retain_graph=True)[0].flatten(0, -2)
                for other in places:
                    S = S + log_p[y].exp().item() * torch.outer(ds[other], ds[other])
    return A / num_tokens, S / num_tokens


def fisher(model: nn.Module, module: nn.Module, sequences: Sequence[Tokens]) -> Tensor:
    """F = mean over sequences of Σ_t Σ_y p_y ∇log p_y ∇log p_yᵀ, the exact block (Eq. 11)."""
    total = 0
    for sequence in sequences:
        for p, gradient in label_gradients(model, module, sequence):
            total = total + p * torch.outer(vec(gradient), vec(gradient))
    return total / len(sequences)


def spectrum(gradients: Sequence[Tensor], Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Λ = mean over sequences of ((Q_A ⊗ Q_S)ᵀ vec G)², as a matrix (Eq. 20)."""
    Q = torch.kron(Q_A, Q_S)
    return unvec(sum((Q.T @ vec(G)) ** 2 for G in gradients) / len(gradients), len(Q_S))


def expected_spectrum(F: Tensor, Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Λ = diag(QᵀFQ) with Q = Q_A ⊗ Q_S, as a matrix."""
    Q = torch.kron(Q_A, Q_S)
    return unvec((Q.T @ F @ Q).diagonal(), len(Q_S))


def ekfac(Q_A: Tensor, Q_S: Tensor, eigenvalues: Tensor) -> Tensor:
    """(Q_A ⊗ Q_S) diag(vec Λ) (Q_A ⊗ Q_S)ᵀ, dense (Eq. 19)."""
    Q = torch.kron(Q_A, Q_S)
    return Q @ vec(eigenvalues).diag() @ Q.T


def damped_solve(G: Tensor, V: Tensor, damping: float) -> Tensor:
    """unvec((G + λI)⁻¹ vec V)."""
    damped = G + damping * torch.eye(len(G), dtype=G.dtype)
    return unvec(torch.linalg.solve(damped, vec(V)), len(V))


# ---- attribution


def influence(
    query_gradients: Sequence[Tensor],
    loss_gradients: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    dampings: Sequence[float],
    num_training_sequences: int,
) -> float:
    """−(1/N) Σ_ℓ ∇fᵀ (G + λI)⁻¹ ∇L, the lists running over layers (Eq. 25 and 30)."""
    total = 0.0
    for f, L, G, damping in zip(query_gradients, loss_gradients, curvatures, dampings, strict=True):
        total -= torch.dot(vec(f), vec(damped_solve(G, L, damping))).item()
    return total / num_training_sequences


def top_k(ids: Sequence[int], scores: Sequence[float], k: int) -> list[tuple[int, float]]:
    """(id, score) of the k highest, equal scores by smaller id."""
    return sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:k]


def move(steps: Sequence[tuple[nn.Module, Tensor]], scale: float) -> None:
    """Add scale · V to (W b) of every module, V being [o, d_in], the bias in the last column."""
    with torch.no_grad():
        for module, V in steps:
            weight = V if module.bias is None else V[:, :-1]
            module.weight += scale * (weight.T if type(module).__name__ == "Conv1D" else weight)
            if module.bias is not None:
                module.bias += scale * V[:, -1]


def effect_of_a_step(
    model: nn.Module,
    sequence: Tokens,
    steps: Sequence[tuple[nn.Module, Tensor]],
    scale: float,
) -> float:
    """d f / d scale when the weights move along the steps, by a central difference."""
    values = []
    with torch.no_grad():
        for there in (scale, -2 * scale):
            move(steps, there)
            values.append(log_probability(model, sequence).item())
        move(steps, scale)
    return (values[0] - values[1]) / (2 * scale)


def proximal_response(
    model: nn.Module,
    modules: Sequence[nn.Module],
    sequences: Sequence[Tokens],
    extra: Tokens,
    damping: float,
    num_training_sequences: int,
) -> list[Tensor]:
    """θ(1/N) − θ of the proximal Bregman response (Eq. 7), [o, d_in] of each module.

    The minimiser of mean Σ_t KL(p_θs ‖ p_θ) + (1/N) L(extra, θ) + (λ/2)‖θ − θs‖², by iterating
    θ ← θs − (1/λ) ∇(the other two terms), a contraction when λ is large. The model is restored.
    """
    with torch.no_grad():
        before = [logits(model, z[0]).softmax(-1) for z in sequences]
    offset = None
    for _ in range(6):
        divergence = 0
        for z, p in zip(sequences, before, strict=True):
            output = logits(model, z[0]).log_softmax(-1)
            for t in targets(z):
                divergence = divergence - (p[t - 1] * output[t - 1]).sum()  # KL up to a constant
        objective = divergence / len(sequences) - log_probability(model, extra) / (
            num_training_sequences
        )
        gradients = [weight_gradient(objective, module) for module in modules]
        if offset is not None:
            move(list(zip(modules, offset, strict=True)), -1.0)
        offset = [-gradient / damping for gradient in gradients]
        move(list(zip(modules, offset, strict=True)), 1.0)
    move(list(zip(modules, offset, strict=True)), -1.0)
    return offset


# ---- filter


def idf(token: int, documents: Sequence[Sequence[int]]) -> float:
    """log((C − c + 0.5) / (c + 0.5) + 1), c documents of C hold the token (Eq. 29)."""
    count = sum(token in document for document in documents)
    return math.log((len(documents) - count + 0.5) / (count + 0.5) + 1)


def tfidf(
    query: Sequence[int], document: Sequence[int], documents: Sequence[Sequence[int]], k1: float
) -> float:
    """Eq. 28 as printed, k₁ and all, the sum running over the query's tokens."""
    total = 0.0
    for token in query:
        exists = 1.0 if token in document else 0.0
        total += (k1 + 1) * exists / (k1 + exists) * idf(token, documents)
    return total


# ---- statistics


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Σ (x − x̄)(y − ȳ) / √(Σ (x − x̄)² Σ (y − ȳ)²)."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def ranks(x: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The Pearson correlation of the ranks."""
    return pearson(ranks(x), ranks(y))
