"""Checkpoints and their tokenizers; with tasks/train.py, the only door to transformers.

Weights are read from safetensors alone and no code that comes with a checkpoint is ever run.
"""

import copy
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
import transformers
from torch import nn

from tasks.adapters import add_adapter, is_adapter
from tasks.checkpoints import ModelReference, checkpoint_files
from tasks.placement import placement, spread
from tasks.precision import SPREAD, devices_of

# Names only: loading the class of models takes seconds, which stages that only tokenize can spare.
CausalLM: TypeAlias = "transformers.PreTrainedModel"
Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerFast"

REMEDY = "correct the folder, or write it again with save_pretrained(folder)"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_model(
    folder: Path, device: str, dtype: torch.dtype, adapter: Path | None = None
) -> CausalLM:
    """A causal language model for measuring: no dropout, no gradients, no cache of keys.

    Args:
        folder: of the checkpoint.
        device: where it shall be; `spread`: over all GPUs.
        dtype: of all weights.
        adapter: the folder of a LoRA adapter of this checkpoint.

    Raises:
        ValueError: no such folder, no safetensors, not a causal language model, weights that
            the model needs and the files do not hold, an adapter that does not fit, or too little
            memory to spread it over.
    """
    _check_folder(folder)
    transformers.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise errors of many kinds here
        raise ValueError(
            f"{folder}: cannot be loaded as a causal language model ({error}); {REMEDY}"
        ) from error
    model, report = loaded
    # transformers only warns here, and goes on with random weights.
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: the checkpoint lacks the weights {sorted(report['missing_keys'])[:5]}, "
            f"which the model of its config.json needs; {REMEDY}"
        )
    model.config.use_cache = False
    if adapter is not None:
        add_adapter(model, adapter)
    model.eval().requires_grad_(False)
    if device != SPREAD:
        return model.to(device)
    free = {each: torch.cuda.mem_get_info(each)[0] for each in devices_of(device)}
    return spread(model, placement(model, free))


def without_weights(folder: Path, blocks: int | None = None) -> CausalLM:
    """The model of a folder's config.json with shapes and no numbers (device `meta`): it takes no
    memory, however large it is.

    Args:
        folder: with config.json; the weights need not be there.
        blocks: so many of its blocks; None: all.

    Raises:
        ValueError: no config.json there, or none of a causal language model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no config.json there, from which a model could be sized; {REMEDY}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if blocks is not None:
            config.num_hidden_layers = blocks
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # as in `load_model`
        raise ValueError(f"{folder}: no causal language model ({error}); {REMEDY}") from error
    model.config.use_cache = False
    return cast(CausalLM, model.eval().requires_grad_(False))


class Unmasked(nn.Module):
    """A model on the device `meta`, of whose tokens transformers asks nothing: where it is given no
    mask, it looks at positions, and here there are none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, tokens: torch.Tensor) -> Any:
        """The model's output for sequences of one length."""
        length = tokens.shape[1]
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device)
        return self._model(tokens, attention_mask=seen)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer, without a length limit of its own.

    Raises:
        ValueError: the folder holds none, one that cannot be read, or one that cannot tell
            characters from tokens.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # Without this, transformers makes up an empty tokenizer.
        raise ValueError(
            f"{folder}: no tokenizer there; one of {', '.join(_TOKENIZER_FILES)} is wanted"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # as in `load_model`
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({error}); {REMEDY}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: the tokenizer is {type(tokenizer).__name__}, which gives no character "
            "offsets; a `fast` one (tokenizer.json) is wanted"
        )
    # Sequences are cut by the stage `tokenize`; the tokenizer need not warn about their length.
    tokenizer.model_max_length = 2**62
    return cast(Tokenizer, tokenizer)


def check_tokenizer_fits(tokenizer: Tokenizer, model: CausalLM) -> None:
    """Every token id must have a row in the model's embedding.

    Raises:
        ValueError: naming both sizes.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer's vocabulary is empty; are its files "
            "complete?"
        )
    if largest >= vocabulary_size(model):
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer does not fit the model: its token ids go up "
            f"to {largest} ({len(tokenizer)} tokens), the model's vocabulary has "
            f"{vocabulary_size(model)}; use the tokenizer that the model was trained with"
        )


def boundary_token(tokenizer: Tokenizer, which: Literal["bos", "eos"]) -> int:
    """The id of the token that begins or ends a document.

    Raises:
        ValueError: the tokenizer has none.
    """
    token = tokenizer.bos_token_id if which == "bos" else tokenizer.eos_token_id
    if token is None:
        raise ValueError(
            f"tokenize.{which}: true, but the tokenizer has no {which.upper()} token; "
            f"set tokenize.{which} to false"
        )
    return cast(int, token)


def vocabulary_size(model: CausalLM) -> int:
    """Rows of the input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def context_length(model: CausalLM) -> int | None:
    """The longest sequence the model has positions for; None where it sets no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def replicate(model: CausalLM) -> CausalLM:
    """A second set of module objects over the same parameters and buffers.

    Threads that each hang hooks on their own replica do not see each other's hooks, and the
    weights are in memory once.
    """
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=cast(dict[int, Any], shared))


_LOCK = threading.Lock()
_LOADED: dict[tuple[str, str, torch.dtype], CausalLM] = {}
_OF_THREAD = threading.local()


def model_for_thread(reference: ModelReference, device: str, dtype: torch.dtype) -> CausalLM:
    """This thread's replica of a model that the process loads once.

    Only the model asked for last is kept, so that memory holds one.
    """
    key = (reference.digest, device, dtype)
    if getattr(_OF_THREAD, "key", None) != key:
        with _LOCK:
            if key not in _LOADED:
                _LOADED.clear()
                _LOADED[key] = load_model(reference.folder, device, dtype, reference.adapter_folder)
            _OF_THREAD.model = replicate(_LOADED[key])
        _OF_THREAD.key = key
    return _OF_THREAD.model


@torch.no_grad()
def generate_greedy(
    model: CausalLM, tokens: Sequence[int], num_tokens: int, stop: int | None = None
) -> list[int]:
    """The model's most probable continuation, token by token, without those it began from.

    Args:
        model: as `load_model` gives it.
        tokens: what to continue; not empty.
        num_tokens: at most so many new tokens.
        stop: end before this token, usually the end of a document.
    """
    written = list(tokens)
    while len(written) - len(tokens) < num_tokens:
        logits = model(torch.tensor([written], device=model.device)).logits
        best = int(logits[0, -1].argmax())
        if best == stop:
            break
        written.append(best)
    return written[len(tokens) :]


def continuation_text(
    tokenizer: Tokenizer, prompt: Sequence[int], continuation: Sequence[int]
) -> str:
    """What the continuation adds to the text of the prompt, cut before a broken character."""
    before = _text(tokenizer, prompt)
    for end in range(len(continuation), 0, -1):
        whole = _text(tokenizer, [*prompt, *continuation[:end]])
        if not whole.endswith("\ufffd"):  # the first bytes of a character, the rest not written
            return whole[len(before) :]
    return ""


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _check_folder(folder: Path) -> None:
    if is_adapter(folder):  # which transformers would add to a base of its own choice
        raise ValueError(
            f"{folder}: an adapter, not a checkpoint; give it as train.checkpoint.adapter, with "
            "the checkpoint that it adapts as train.checkpoint.base"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no checkpoint there; a folder with config.json, *.safetensors and a "
            "tokenizer is wanted"
        )
    if not any(file.suffix == ".safetensors" for file in checkpoint_files(folder)):
        raise ValueError(
            f"{folder}: no *.safetensors there; only safetensors are read (a .bin or .pt file "
            "can run code when it is loaded): convert with model.save_pretrained(folder)"
        )
