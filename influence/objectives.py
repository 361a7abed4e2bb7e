"""What is differentiated: training loss L, pseudo-loss, and f = log p(completion | prompt).

All three are sums over supervised tokens, in nats (Grosse et al. 2023, Eq. 22 and 24). They are
three functions with three names, never one with a flag: which labels a loss uses decides whether
the curvature is the Fisher or something else.
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from influence.sequences import TokenBatch


def forward(model: nn.Module, batch: TokenBatch) -> Float[Tensor, "n t v"]:
    """Logits of a causal language model; `logits[:, t]` predicts token t + 1."""
    output = model(batch.tokens)
    return output if isinstance(output, Tensor) else output.logits


def training_loss(logits: Float[Tensor, "n t v"], batch: TokenBatch) -> Float[Tensor, " n"]:
    """L(z) = −Σ_t log p(z_t | z_<t) over supervised tokens, with the true labels (Eq. 22)."""
    return -_log_likelihood(logits, batch, batch.tokens)


def pseudo_loss(
    logits: Float[Tensor, "n t v"], batch: TokenBatch, labels: Int[Tensor, "n t"]
) -> Float[Tensor, " n"]:
    """−Σ_t log p(ŷ_t | z_<t) with labels sampled from the model: its gradients give the true
    Fisher (Grosse et al. 2023, Eq. 11)."""
    return -_log_likelihood(logits, batch, labels)


def log_probability(logits: Float[Tensor, "n t v"], batch: TokenBatch) -> Float[Tensor, " n"]:
    """f = log p(completion | prompt), the completion being the supervised tokens (Eq. 24)."""
    return _log_likelihood(logits, batch, batch.tokens)


def _log_likelihood(
    logits: Float[Tensor, "n t v"], batch: TokenBatch, labels: Int[Tensor, "n t"]
) -> Float[Tensor, " n"]:
    # Unsupervised positions are left out before the softmax: they cost nothing.
    row, position = batch.loss_positions.nonzero(as_tuple=True)
    log_likelihood = -nn.functional.cross_entropy(
        logits[row, position].float() if logits.dtype.itemsize < 4 else logits[row, position],
        labels[row, position + 1],
        reduction="none",
    )
    total = log_likelihood.new_zeros(len(batch.ids))
    return total.index_add(0, row, log_likelihood)


@torch.no_grad()
def sample_labels(
    logits: Float[Tensor, "n t v"], batch: TokenBatch, seed: int
) -> Int[Tensor, "n t"]:
    """One label per supervised token, drawn from the model; `labels[:, t]` replaces token t.

    The uniform behind each draw comes from (seed, sequence id, position) alone, so that batch,
    order, shard, worker and restart do not change it. Other positions keep their token.
    """
    row, position = batch.loss_positions.nonzero(as_tuple=True)
    uniform = counter_uniform(seed, batch.ids, batch.tokens.shape[1])[row, position + 1]
    # Inverse transform in float64: rounding must not move a draw over a boundary.
    cumulative = logits[row, position].double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1), right=True).squeeze(-1)
    labels = batch.tokens.clone()
    labels[row, position + 1] = drawn.clamp(max=logits.shape[-1] - 1)
    return labels


def counter_uniform(
    seed: int, ids: Int[Tensor, " n"], num_positions: int
) -> Float64[Tensor, "n t"]:
    """Uniforms in [0, 1) from a counter: a hash of (seed, id, position), no state.

    Three rounds of the splitmix64 finaliser (Steele, Lea and Flood 2014), one per coordinate.
    """
    positions = torch.arange(num_positions, device=ids.device)
    start = _mix(torch.tensor(_signed(seed), device=ids.device))
    bits = _mix(_mix(start ^ ids).unsqueeze(1) ^ positions)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    # Logical shift: torch's >> on int64 would copy the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The 64 bits of `value` as torch's int64 reads them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
