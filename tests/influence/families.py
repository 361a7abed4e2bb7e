"""Small random models of the families that people have, from transformers' own code and configs.

Each is a few kilobytes, has at least two decoder layers where its layers differ, and a window
shorter than `CONTEXT` where its attention has one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.influence.models import VOCABULARY, randomise

CONTEXT = 16
WINDOW = 3
WIDTH = 8

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 5,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_ALTERNATE = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_CAPPED = {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5}  # low enough to bend
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_HEADS = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_QKV, _GATE_UP = _HEADS[:3], _GATED[:2]


@dataclass(frozen=True)
class Family:
    """A family: its config, and what a person who reads its code would say of it.

    Attributes:
        model_type: as in config.json.
        config: what differs from the sizes that all share; None takes one away.
        blocks: the prefix of the decoder layers' names, with a place for their number.
        mlp: the linear layers of one block's MLP, by the ends of their names.
        attention: those of its attention.
        shared: of one block, the layers that take one input.
        tied: whether the unembedding is the embedding.
        others: linear layers outside the blocks, without a tied unembedding.
        norms: modules in attention or MLP that hold parameters and are not linear.
    """

    model_type: str
    blocks: str = "model.layers.{}."
    config: Mapping[str, Any] = field(default_factory=dict)
    mlp: tuple[str, ...] = _GATED
    attention: tuple[str, ...] = _HEADS
    shared: tuple[tuple[str, ...], ...] = (_QKV, _GATE_UP)
    tied: bool = False
    others: tuple[str, ...] = ("lm_head",)
    norms: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.get("num_hidden_layers", _SIZES["num_hidden_layers"])

    def names(self, ends: tuple[str, ...]) -> list[str]:
        """Full names, block by block."""
        return [self.blocks.format(n) + end for n in range(self.num_layers) for end in ends]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "gpt2", "transformer.h.{}.",
        # GPT-2 names its sizes in its own way; transformers maps those that it knows.
        {"n_positions": CONTEXT, "n_inner": 5},
        mlp=("mlp.c_fc", "mlp.c_proj"), attention=("attn.c_attn", "attn.c_proj"),
        shared=(), tied=True, others=(),
    ),
    "llama": Family("llama"),
    "mistral": Family("mistral", config={"sliding_window": WINDOW}),
    "qwen2": Family("qwen2"),  # biases on q, k and v alone
    "qwen3": Family("qwen3", norms=("self_attn.q_norm", "self_attn.k_norm")),
    "gemma2": Family(
        "gemma2", config={**_ALTERNATE, **_CAPPED, "sliding_window": WINDOW}, tied=True, others=(),
    ),
    "gemma3": Family(
        "gemma3_text", config={**_ALTERNATE, "sliding_window": WINDOW}, tied=True, others=(),
        norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    "gpt_neox": Family(
        "gpt_neox", "gpt_neox.layers.{}.", {"rope_parameters": _HALF_ROTARY},
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        attention=("attention.query_key_value", "attention.dense"), shared=(),
    ),
    "opt": Family(
        "opt", "model.decoder.layers.{}.", {"ffn_dim": 5, "word_embed_proj_dim": 6},
        mlp=("fc1", "fc2"), attention=(*_QKV, "self_attn.out_proj"), shared=(_QKV,), tied=True,
        others=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    "phi": Family(
        "phi", config={"rope_parameters": _HALF_ROTARY}, mlp=("mlp.fc1", "mlp.fc2"),
        attention=(*_QKV, "self_attn.dense"), shared=((*_QKV, "mlp.fc1"),),
    ),
    "gpt_neo": Family(
        "gpt_neo", "transformer.h.{}.",
        {
            "num_hidden_layers": 2, "attention_types": [[["local", "global"], 1]],
            "window_size": WINDOW, "num_layers": 2, "num_heads": 2,
        },
        mlp=("mlp.c_fc", "mlp.c_proj"),
        attention=tuple(f"attn.attention.{part}_proj" for part in ("q", "k", "v", "out")),
        shared=(tuple(f"attn.attention.{part}_proj" for part in "qkv"),), tied=True, others=(),
    ),
    "bloom": Family(
        "bloom", "transformer.h.{}.",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        attention=("self_attention.query_key_value", "self_attention.dense"),
        shared=(), tied=True, others=(),
    ),
    "falcon": Family(
        "falcon", "transformer.h.{}.", {"head_dim": None, "ffn_hidden_size": 5},
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        attention=("self_attention.query_key_value", "self_attention.dense"),
        shared=(("self_attention.query_key_value", "mlp.dense_h_to_4h"),), tied=True, others=(),
    ),
    "olmo2": Family("olmo2", norms=("self_attn.q_norm", "self_attn.k_norm")),
}  # fmt: skip


def build(name: str, attention: str | None = None, seed: int = 0) -> nn.Module:
    """The family's model, computing in float64 throughout.

    `attention` is transformers' `attn_implementation`; None: its own choice, as in a load.
    """
    family = FAMILIES[name]
    sizes = {key: size for key, size in {**_SIZES, **family.config}.items() if size is not None}
    config = AutoConfig.for_model(family.model_type, **sizes)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = randomise(model, seed)
    run = model.forward

    def in_double(*args: Any, **options: Any) -> Any:
        with double_throughout():
            return run(*args, **options)

    model.forward = in_double
    return model


class _Double(TorchFunctionMode):
    """Casts of float64 down to float32 do nothing.

    Norms, and eager attention's softmax, compute in float32 whatever they are given: 1e-7 would be
    the floor of every comparison.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        is_double = bool(args) and isinstance(args[0], torch.Tensor)
        is_double = is_double and args[0].dtype == torch.float64
        if is_double and name == "float":
            return args[0]
        if is_double and name in ("to", "type", "softmax"):
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def double_throughout() -> Iterator[None]:
    """A float64 model computes in float64 everywhere."""
    with _Double():
        yield
