"""What is differentiated: training loss L, pseudo-loss, and f = log p(completion | prompt).

All three are sums over supervised tokens, in nats (Grosse et al. 2023, Eq. 22 and 24). They are
three functions with three names, never one with a flag: which labels a loss uses decides whether
the curvature is the Fisher or something else.
"""

from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from influence.examples import Batch
from influence.outputhead import HeadSoftmax
from influence.sequences import TokenBatch


def forward(model: nn.Module, batch: Batch) -> Float[Tensor, "n ..."]:
    """The model's outputs; logits of a causal language model predict token t + 1 at t."""
    output = model(batch.inputs)
    return output if isinstance(output, Tensor) else output.logits


def training_loss(outputs: Float[Tensor, "n ..."], batch: Batch) -> Float[Tensor, " n"]:
    """L(z) = −Σ_t log p(z_t | z_<t) over supervised tokens, with the true labels (Eq. 22)."""
    return _loss(outputs, batch, batch.targets)


def pseudo_loss(
    outputs: Float[Tensor, "n ..."], batch: Batch, labels: Tensor
) -> Float[Tensor, " n"]:
    """−Σ_t log p(ŷ_t | z_<t) with labels sampled from the model: its gradients give the true
    Fisher (Grosse et al. 2023, Eq. 11)."""
    return _loss(outputs, batch, labels)


def log_probability(outputs: Float[Tensor, "n ..."], batch: Batch) -> Float[Tensor, " n"]:
    """f = log p(completion | prompt), the completion being the supervised tokens (Eq. 24)."""
    return -_loss(outputs, batch, batch.targets)


def sampled_loss(outputs: Float[Tensor, "n ..."], batch: Batch, seed: int) -> Float[Tensor, " n"]:
    """`pseudo_loss` with the labels of `sample_labels`; without logits, both in one go."""
    if not isinstance(batch.likelihood, HeadSoftmax):
        return pseudo_loss(outputs, batch, sample_labels(outputs, batch, seed))
    assert isinstance(batch, TokenBatch)
    return _loss(outputs, batch, batch.targets, _uniform_of_rows(batch, seed))


def _loss(
    outputs: Tensor, batch: Any, labels: Tensor, *uniform: Float64[Tensor, "m 1"]
) -> Float[Tensor, " n"]:
    if isinstance(batch, TokenBatch) and batch.most_carry_loss:
        rows, targets = outputs.flatten(0, 1), batch.position_labels(labels).flatten()
        owners = torch.arange(len(batch.ids), device=rows.device)
        owners = owners.repeat_interleave(outputs.shape[1])
    else:
        rows, targets, owners = batch.rows(outputs), batch.row_labels(labels), batch.owners
    losses = batch.likelihood.loss(rows, targets, *uniform)
    return losses.new_zeros(len(batch.ids)).index_add(0, owners, losses)


@torch.no_grad()
def sample_labels(outputs: Float[Tensor, "n ..."], batch: Batch, seed: int) -> Tensor:
    """One label per row of outputs that carries a loss, drawn from the model.

    The uniforms behind each draw come from (seed, id, position) alone, so that batch, order,
    shard, worker and restart do not change it. For token sequences `labels[:, t]` replaces token
    t, and unsupervised tokens stay.
    """
    likelihood = batch.likelihood
    if isinstance(batch, TokenBatch):
        return _sample_tokens(outputs, batch, seed)
    rows = batch.rows(outputs)
    uniform = counter_uniform(seed, batch.ids, likelihood.num_uniforms(rows.shape[-1]))
    return likelihood.sample(rows, uniform)


def _sample_tokens(
    outputs: Float[Tensor, "n t v"], batch: TokenBatch, seed: int
) -> Int[Tensor, "n t"]:
    uniform = _uniform_of_rows(batch, seed)
    if not batch.most_carry_loss:
        return batch.with_row_labels(batch.likelihood.sample(batch.rows(outputs), uniform))
    # A draw for every position, of which those that carry no loss are not used.
    drawn = batch.likelihood.sample(outputs.flatten(0, 1), uniform)
    labels = nn.functional.pad(drawn.view_as(batch.tokens)[:, :-1], (1, 0))
    return labels.where(batch.supervised, batch.tokens)


def _uniform_of_rows(batch: TokenBatch, seed: int) -> Float64[Tensor, "m 1"]:
    """Of each row of `_loss`, the uniform of the token that it predicts; of the last position of a
    sequence, which predicts none, any."""
    uniform = counter_uniform(seed, batch.ids, batch.tokens.shape[1])
    if not batch.most_carry_loss:
        return batch.row_labels(uniform).unsqueeze(-1)
    return nn.functional.pad(uniform[:, 1:], (0, 1)).reshape(-1, 1)


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
