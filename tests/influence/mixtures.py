"""Small random mixtures of experts, fused as transformers has them, and the same taken apart."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from influence.experts import separate_experts
from tests import oracles
from tests.influence.models import VOCABULARY, Tokens, randomise

NUM_EXPERTS, TOP = 4, 2
WIDTH, HIDDEN = 4, 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": 5, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
    "max_position_embeddings": 16, "num_local_experts": NUM_EXPERTS, "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

# Weights with outputs before inputs, and with inputs before outputs and biases (gpt_oss); beside
# a shared expert (qwen2_moe); routers that are parameters, and one that is a kind of nn.Linear.
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "olmoe")


def fused(kind: str, seed: int = 0, num_layers: int = 1) -> nn.Module:
    """The model in float64, computing as its own code is written; its weights are fused."""
    config = AutoConfig.for_model(kind, **_SIZES | {"num_hidden_layers": num_layers})
    config.use_cache = False
    # The kernels that transformers prefers have no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return randomise(model, seed)


def apart(model: nn.Module) -> nn.Module:
    """A copy with its experts taken apart."""
    return separate_experts(copy.deepcopy(model))


def slices(model: nn.Module) -> dict[str, tuple[nn.Parameter, int, bool]]:
    """By the name of an expert's layer: the fused parameter, which expert, if it is transposed."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            for each in ("gate_up_proj", "down_proj"):
                for expert in range(NUM_EXPERTS):
                    where = f"{name}.{expert}.{each}"
                    found[where] = getattr(module, each), expert, module.is_transposed
    return found


# ---- slow and obvious, from the fused weights


def block_gradient(scalar: Tensor, model: nn.Module, name: str) -> Tensor:
    """d scalar / d (W b) of one expert, cut out of the gradient of the fused parameter."""
    weight, expert, transposed = slices(model)[name]
    bias = dict(model.named_parameters()).get(f"{_parent(name)}.{name.split('.')[-1]}_bias")
    kept = [weight] if bias is None else [weight, bias]
    grads = torch.autograd.grad(scalar, kept, retain_graph=True, allow_unused=True)
    found = [
        torch.zeros_like(one[expert]) if grad is None else grad[expert]
        for one, grad in zip(kept, grads, strict=True)
    ]
    matrix = found[0].T if transposed else found[0]
    return matrix if bias is None else torch.cat([matrix, found[1][:, None]], dim=1)


def expert_io(
    model: nn.Module, name: str, sequence: Tokens, labels: Tensor | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """By the positions that one expert sees: ā with the 1 of a bias, and d log p / d s.

    The experts run token by token here, as the definition of a mixture says.
    """
    holder, projection = model.get_submodule(_parent(name)), name.split(".")[-1]
    number, seen = int(name.split(".")[-2]), {}

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for t, token in enumerate(hidden):
            total = torch.zeros_like(token)
            for slot, expert in enumerate(chosen[t].tolist()):
                a, s = _linear(holder, "gate_up_proj", expert, token)
                between = holder._apply_gate(s)
                a_down, s_down = _linear(holder, "down_proj", expert, between)
                total = total + weights[t, slot] * s_down
                if expert == number:
                    seen[t] = (a, s) if projection == "gate_up_proj" else (a_down, s_down)
            rows.append(total)
        return torch.stack(rows)

    holder.forward = forward
    try:
        log_p = oracles.log_probability(model, sequence, labels)
    finally:
        del holder.forward
    if not seen:
        return {}
    grads = torch.autograd.grad(log_p, [s for _, s in seen.values()], allow_unused=True)
    return {
        t: (a.detach(), torch.zeros_like(s) if ds is None else ds)
        for (t, (a, s)), ds in zip(seen.items(), grads, strict=True)
    }


def _linear(holder: nn.Module, name: str, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = getattr(holder, name)[expert], getattr(holder, f"{name}_bias", None)
    s = (weight.T if holder.is_transposed else weight) @ x
    if bias is None:
        return x, s
    return torch.cat([x, x.new_ones(1)]), s + bias[expert]


def _parent(name: str) -> str:
    return name.rsplit(".", 2)[0]
