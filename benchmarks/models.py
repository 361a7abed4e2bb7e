"""The fixed models of the benchmarks, from configurations and random; and their tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from influence.likelihoods import NO_TARGET
from influence.sequences import TokenBatch

SEED = 0
VOCABULARY = 8192
CONTEXT = 2048
NAMES = ("S", "M", "L")


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks, width, heads, and the width of an MLP."""

    blocks: int
    width: int
    heads: int
    hidden: int
    llama: bool = False


SHAPES: Mapping[str, Shape] = {
    "S": Shape(4, 256, 4, 1024),
    "M": Shape(8, 512, 8, 2048),
    # A Llama of M's size: its MLP has three matrices, not two.
    "L": Shape(8, 512, 8, 1536, llama=True),
}


def shape_of(name: str) -> Shape:
    """One of the fixed shapes: `S` and `M` are GPT-2s, `L` is a Llama.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"model {name!r} is none of {', '.join(NAMES)}")
    return SHAPES[name]


def build(shape: Shape) -> PreTrainedModel:
    """A GPT-2, or a Llama whose queries share keys in pairs; in float32, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        if shape.llama:
            model: PreTrainedModel = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    max_position_embeddings=CONTEXT,
                    hidden_size=shape.width,
                    intermediate_size=shape.hidden,
                    num_hidden_layers=shape.blocks,
                    num_attention_heads=shape.heads,
                    num_key_value_heads=shape.heads // 2,
                    tie_word_embeddings=True,
                )
            )
        else:
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCABULARY,
                    n_positions=CONTEXT,
                    n_embd=shape.width,
                    n_layer=shape.blocks,
                    n_head=shape.heads,
                    n_inner=shape.hidden,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                )
            )
    model.config.use_cache = False
    return model.float().eval()


def torchs_loss(
    logits: Float[Tensor, "n t v"], batch: TokenBatch, labels: Int[Tensor, "n t"]
) -> Float[Tensor, " n"]:
    """What the unit and the peers differentiate: cross-entropy as PyTorch has it.

    Our passes have one of their own (`influence/likelihoods.py`), of the same value.
    """
    rows, targets = logits.flatten(0, 1), batch.position_labels(labels).flatten()
    losses = nn.functional.cross_entropy(rows, targets, reduction="none", ignore_index=NO_TARGET)
    return losses.view(len(batch.ids), -1).sum(dim=1)


def sequences(num: int, length: int, seed: int) -> TokenBatch:
    """Tokens by Zipf's law: the k-th most common has probability proportional to 1/k."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    tokens = torch.multinomial(weights, num * length, replacement=True, generator=generator)
    supervised = torch.ones(num, length, dtype=torch.bool)
    supervised[:, 0] = False
    return TokenBatch(torch.arange(num), tokens.view(num, length), supervised)
