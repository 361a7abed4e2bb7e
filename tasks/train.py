"""Stage `train`: link a checkpoint that exists, or train a small model from scratch.

A model trained here sees the very sequences that its influence is measured over. With
tasks/models.py, the only door to transformers.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tasks import store
from tasks.checkpoints import (
    ModelReference,
    Source,
    checkpoint_files,
    hub_snapshot,
    write_reference,
)
from tasks.corpora import Corpus, documents, survey
from tasks.models import (
    CausalLM,
    Tokenizer,
    check_tokenizer_fits,
    context_length,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from tasks.origin import Architecture, LocalCheckpoint, Scratch
from tasks.seeded import seeded
from tasks.windows import cut_windows, encode
from tasks.workspace import StageContext

BOS, EOS = "<s>", "</s>"
_IGNORED = -100  # the label that cross entropy passes over


def run(context: StageContext) -> None:
    """Write model.json; for a model trained here also checkpoint/ and train.json.

    Raises:
        ValueError: a checkpoint that is absent, is no causal language model, has no safetensors
            or no tokenizer, or whose tokenizer does not fit; a corpus that cannot be read.
    """
    given = context.params.train
    if isinstance(given, Scratch):
        checkpoint = context.out / "checkpoint"
        _from_scratch(context, given.scratch, checkpoint)
        reference = inspect_checkpoint(checkpoint, "scratch", checkpoint.name)
    elif isinstance(given.checkpoint, LocalCheckpoint):
        path = given.checkpoint.path
        try:
            reference = inspect_checkpoint(context.input(path), "checkpoint", path)
        except ValueError as error:
            raise ValueError(f"train.checkpoint.path: {error}") from error
    else:
        name, revision = given.checkpoint.hub, given.checkpoint.revision
        reference = inspect_checkpoint(hub_snapshot(name, revision), "hub", name, revision)
    write_reference(reference, context.out / "model.json")


def inspect_checkpoint(
    folder: Path, source: Source, path: str, revision: str | None = None
) -> ModelReference:
    """Load a checkpoint and its tokenizer once, check that they fit, and describe them.

    Args:
        folder: where it lies.
        source: where it came from.
        path: how model.json shall name it.
        revision: the hub's commit.
    """
    model, tokenizer = load_model(folder, "cpu", torch.float32), load_tokenizer(folder)
    check_tokenizer_fits(tokenizer, model)
    return ModelReference(
        source=source,
        path=path,
        revision=revision,
        folder=folder,
        files=tuple((file.name, store.digest(file)) for file in checkpoint_files(folder)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=vocabulary_size(model),
        context=context_length(model),
    )


def _from_scratch(context: StageContext, architecture: Architecture, checkpoint: Path) -> None:
    params = context.params
    corpus = Corpus.of(params.corpus, context.root)
    survey(corpus)  # a bad line stops the run before the training, not in the middle of it
    read = list(documents(corpus))
    tokenizer = train_tokenizer((document.text for document in read), architecture.vocabulary)
    tokens = encode(tokenizer, read, params.tokenize.bos, params.tokenize.eos)
    windows = cut_windows(
        [document.id for document in read], tokens, params.tokenize.mode, params.tokenize.context
    )
    ends = windows.offsets[1:-1]
    sequences = np.split(windows.tokens, ends)
    model = new_model(architecture, len(tokenizer))
    losses = train_model(
        model,
        sequences,
        np.split(windows.supervised, ends),
        architecture,
        context.work / "trainer",
        params.runtime.device,
    )
    tokenizer.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    store.write_json(
        context.out / "train.json",
        {
            **architecture.model_dump(),
            "vocabulary": len(tokenizer),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_sequences": len(sequences),
            "num_tokens": len(windows.tokens),
            "losses": losses,
        },
    )


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


def train_model(
    model: CausalLM,
    sequences: Sequence[NDArray[np.int32]],
    supervised: Sequence[NDArray[np.bool_]],
    architecture: Architecture,
    work: Path,
    device: str,
) -> list[dict[str, float]]:
    """Train in place with AdamW, a short warm-up and a cosine decay.

    Returns:
        The mean loss, nats a token, since the step before, at about fifty steps.
    """
    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=architecture.steps,
        per_device_train_batch_size=architecture.batch,
        learning_rate=architecture.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=architecture.steps // 20,
        seed=architecture.seed % 2**32,  # the range of NumPy's generator, which is seeded too
        use_cpu=device == "cpu" or not torch.cuda.is_available(),
        logging_steps=max(1, architecture.steps // 50),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    # Some sequences have no target, as those of one token; a batch of such would have no loss.
    rows = [
        (torch.from_numpy(row.astype(np.int64)), torch.from_numpy(targets))
        for row, targets in zip(sequences, supervised, strict=True)
        if targets.any()
    ]
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]  a list serves as a dataset
        data_collator=_collate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [
        {"step": entry["step"], "loss": entry["loss"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _collate(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; under causal attention no real position sees the padding."""
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [tokens.masked_fill(~targets, _IGNORED) for tokens, targets in rows]
    return {
        "input_ids": pad([tokens for tokens, _ in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=_IGNORED),
    }
