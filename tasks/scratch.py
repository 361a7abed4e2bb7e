"""A tokenizer and a model that begin from nothing."""

from collections.abc import Iterable
from typing import Any

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tasks.models import CausalLM, Tokenizer
from tasks.origin import Architecture
from tasks.seeded import seeded

BOS, EOS = "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer; its special tokens are <s> (0) and </s> (1).

    Bytes can write any text, so it needs no unknown token. Where the corpus has too few pairs to
    merge, the vocabulary stays smaller than asked for.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS
    )


def new_model(architecture: Architecture, vocabulary: int) -> CausalLM:
    """A model with random weights, the same for the same seed; no dropout, and a tied head.

    The MLP is four times as wide as the residual stream in GPT-2 and, having three matrices, the
    usual 8/3 in Llama.
    """
    size: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "max_position_embeddings": architecture.context,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    if architecture.architecture == "gpt2":
        config: transformers.PreTrainedConfig = transformers.GPT2Config(
            **size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    else:
        config = transformers.LlamaConfig(
            **size, intermediate_size=8 * -(-architecture.width // 3), pad_token_id=None
        )
    with seeded(architecture.seed):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # GPT-2's class name tells transformers no loss type. It then takes this one all the same, but
    # its Trainer divides by one token a sequence too many.
    model.loss_type = "ForCausalLM"
    return model


def new_gpt2(
    *, vocabulary: int, context: int, blocks: int, width: int, heads: int, hidden: int, seed: int
) -> CausalLM:
    """A GPT-2 with random weights for a benchmark, the same for the same seed; no dropout.

    Attention is plain matrix products: fused kernels have no forward-mode derivative.
    """
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=width,
        n_layer=blocks,
        n_head=heads,
        n_inner=hidden,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with seeded(seed):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
