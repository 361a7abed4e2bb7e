"""Tiny random models in float64 and corpora for them; every kind of layer, milliseconds a pass.

Vocabularies are small, so that an oracle can enumerate all labels.
"""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from influence.capture import LayerIO, capture
from influence.layers import Layer, find_layers
from influence.objectives import forward, sample_labels
from influence.sequences import TokenBatch

VOCABULARY = 6
Tokens = tuple[Tensor, Tensor]


def gpt2(seed: int = 0, num_layers: int = 1) -> nn.Module:
    """GPT-2: transposed Conv1D layers with bias, unembedding tied to the embedding."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=4, n_inner=6, n_layer=num_layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return randomise(GPT2LMHeadModel(config), seed)


def llama(seed: int = 0, num_layers: int = 1) -> nn.Module:
    """Llama: no bias, two key-value heads for four query heads, gated MLP, untied unembedding."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=5, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # transformers' RMSNorm computes in float32 whatever it is given: 1e-7 would be the floor of
    # every comparison below.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return randomise(model, seed)


class FeedForward(nn.Module):
    """Two linear layers with bias, and a running mean between them.

    The mean is what attention is to a transformer: a position's output feeds later losses.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).tanh()
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        return self.fc2(hidden.cumsum(1) / steps[:, None])


class MLPLanguageModel(nn.Module):
    """A causal language model of plain `nn.Linear`s with bias."""

    def __init__(self, width: int = 3, hidden: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.block = nn.ModuleDict({"mlp": FeedForward(width, hidden)})
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.block["mlp"](self.embedding(input_ids))))


def mlp(seed: int = 0) -> nn.Module:
    """The MLP language model."""
    return randomise(MLPLanguageModel(), seed)


def deep_linear(seed: int = 0) -> nn.Module:
    """Linear layers with nothing between them."""
    return randomise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), seed)


CASES: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama, "mlp": mlp}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """The model in float64 with weights far from any special point (zero biases, unit norms)."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_gain else 0.6 * noise)
    return model


def attributed(model: nn.Module) -> tuple[Layer, ...]:
    """Every layer that can be attributed."""
    return find_layers(model, ["all"])[0]


def corpus(seed: int = 0, lengths: Sequence[int] = (6, 3, 5, 2), prompt: int = 2) -> list[Tokens]:
    """Random sequences of unequal length; every second one has an unsupervised prompt."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        first = min(prompt, length - 1) if number % 2 == 0 else 1
        sequences.append((tokens, torch.arange(length) >= first))
    return sequences


def batch(sequences: Sequence[Tokens], ids: Iterable[int] | None = None) -> TokenBatch:
    """The sequences as one padded batch; ids count from 100 by default."""
    keys = list(range(100, 100 + len(sequences))) if ids is None else list(ids)
    return TokenBatch.collate(keys, [z[0] for z in sequences], [z[1] for z in sequences])


def drawn_labels(
    model: nn.Module, sequences: Sequence[Tokens], seed: int, ids: Iterable[int] | None = None
) -> list[Tensor]:
    """The labels that a fit with this seed draws, one unpadded row a sequence."""
    with torch.no_grad():
        together = batch(sequences, ids)
        labels = sample_labels(forward(model, together), together, seed)
    return [row[: len(z[0])] for row, z in zip(labels, sequences, strict=True)]


def random_io(
    seed: int, n: int = 3, t: int = 4, i: int = 3, o: int = 2, has_bias: bool = True
) -> LayerIO:
    """A layer's inputs and output gradients, out of nothing."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
    ds = torch.randn(n, t, o, generator=generator, dtype=torch.float64)
    return LayerIO(a, ds, has_bias)


def orthogonal(seed: int, size: int) -> Tensor:
    """A random orthogonal matrix, far from symmetric, so that rows and columns differ."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got − wanted| / max |wanted|."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def io_of(
    model: nn.Module,
    layers: Sequence[Layer],
    tokens: TokenBatch,
    objective: Callable[[Tensor, TokenBatch], Tensor],
) -> dict[str, LayerIO]:
    """One captured pass of the batch's summed objective."""
    with capture(model, layers) as opened:
        return opened.backward(objective(forward(model, tokens), tokens).sum())
