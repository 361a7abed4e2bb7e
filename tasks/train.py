"""Stage `train`: link a checkpoint that exists, train one on, or a small model from scratch.

A model trained here sees the very sequences that its influence is measured over. With
tasks/models.py, the only door to transformers.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tasks import store
from tasks.checkpoints import (
    ADAPTER,
    ModelReference,
    Source,
    checkpoint_files,
    hub_snapshot,
    write_reference,
)
from tasks.corpora import Corpus, Document, read_all
from tasks.faraway import check_record, is_far
from tasks.models import (
    CausalLM,
    Tokenizer,
    check_tokenizer_fits,
    context_length,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from tasks.origin import (
    AdapterCheckpoint,
    Architecture,
    FineTuned,
    LocalCheckpoint,
    Scratch,
    Training,
    Tuning,
)
from tasks.scratch import new_model, train_tokenizer
from tasks.shards import watched
from tasks.windows import cut_windows, encode
from tasks.workspace import StageContext

SAVE_STEPS = 100  # of a training, what is lost at most when it is killed
_IGNORED = -100  # the label that cross entropy passes over


def run(context: StageContext) -> None:
    """Write model.json; for a model trained here, from scratch or on, also checkpoint/, train.json.

    Raises:
        ValueError: a checkpoint that is absent, is no causal language model, has no safetensors
            or no tokenizer, or whose tokenizer does not fit; a corpus that cannot be read.
    """
    given = context.params.train
    if isinstance(given, Scratch):
        checkpoint = context.out / "checkpoint"
        _from_scratch(context, given.scratch, checkpoint)
        reference = inspect_checkpoint(checkpoint, "scratch", checkpoint.name)
    elif isinstance(given, FineTuned):
        checkpoint = context.out / "checkpoint"
        _fine_tune(context, given.finetune, checkpoint)
        reference = inspect_checkpoint(checkpoint, "finetuned", checkpoint.name)
    elif isinstance(given.checkpoint, LocalCheckpoint):
        path = given.checkpoint.path
        try:
            reference = inspect_checkpoint(context.input(path), "checkpoint", path)
        except ValueError as error:
            raise ValueError(f"train.checkpoint.path: {error}") from error
    elif isinstance(given.checkpoint, AdapterCheckpoint):
        reference = _adapted(context, given.checkpoint)
    else:
        name, revision = given.checkpoint.hub, given.checkpoint.revision
        reference = inspect_checkpoint(hub_snapshot(name, revision), "hub", name, revision)
    write_reference(reference, context.out / "model.json")


def inspect_checkpoint(
    folder: Path,
    source: Source,
    path: str,
    revision: str | None = None,
    adapter: tuple[str, Path] | None = None,
) -> ModelReference:
    """Load a checkpoint and its tokenizer once, check that they fit, and describe them.

    Args:
        folder: where it lies.
        source: where it came from.
        path: how model.json shall name it.
        revision: the hub's commit.
        adapter: of the checkpoint: how model.json shall name it, and where it lies.
    """
    name, place = adapter or (None, None)
    model = load_model(folder, "cpu", torch.float32, place)
    tokenizer = load_tokenizer(folder)
    check_tokenizer_fits(tokenizer, model)
    files = {file.name: file for file in checkpoint_files(folder)}
    if place is not None:
        files |= {f"{ADAPTER}{file.name}": file for file in checkpoint_files(place)}
    return ModelReference(
        source=source,
        path=path,
        revision=revision,
        folder=folder,
        files=tuple(sorted((key, store.digest(file)) for key, file in files.items())),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=vocabulary_size(model),
        context=context_length(model),
        adapter=name,
        adapter_folder=place,
    )


def _adapted(context: StageContext, given: AdapterCheckpoint) -> ModelReference:
    adapter = given.adapter, context.input(given.adapter)
    try:
        return inspect_checkpoint(
            context.input(given.base), "checkpoint", given.base, adapter=adapter
        )
    except ValueError as error:
        raise ValueError(f"train.checkpoint.adapter: {error}") from error


def _from_scratch(context: StageContext, architecture: Architecture, checkpoint: Path) -> None:
    read = _read(context)
    tokenizer = train_tokenizer((document.text for document in read), architecture.vocabulary)
    _train_on(
        context, read, tokenizer, new_model(architecture, len(tokenizer)), architecture, checkpoint
    )


def _fine_tune(context: StageContext, tuning: Tuning, checkpoint: Path) -> None:
    read, base = _read(context), context.input(tuning.path)
    try:
        model, tokenizer = load_model(base, "cpu", torch.float32), load_tokenizer(base)
        check_tokenizer_fits(tokenizer, model)
    except ValueError as error:
        raise ValueError(f"train.finetune.path: {error}") from error
    longest = context_length(model)
    if longest is not None and context.params.tokenize.context > longest:
        raise ValueError(
            f"tokenize.context {context.params.tokenize.context} is longer than the {longest} "
            f"positions of the model in train.finetune.path, {tuning.path}; lower it"
        )
    if tuning.chat_template is not None:
        tokenizer.chat_template = tuning.chat_template
    model.loss_type = "ForCausalLM"
    _train_on(context, read, tokenizer, model.requires_grad_(True), tuning, checkpoint)


def _read(context: StageContext) -> list[Document]:
    """The corpus; a bad line stops the run before the training, not in the middle of it."""
    corpus = Corpus.of(context.params.corpus, context.root)
    if is_far(context.params.corpus.path):
        check_record(context.root, context.params.corpus.path)
    return read_all(corpus)


def _train_on(
    context: StageContext,
    read: Sequence[Document],
    tokenizer: Tokenizer,
    model: CausalLM,
    training: Training,
    checkpoint: Path,
) -> None:
    """Train on the very sequences that the stage `tokenize` will make; write the checkpoint."""
    params = context.params
    tokens = encode(tokenizer, read, params.tokenize.bos, params.tokenize.eos)
    windows = cut_windows(
        [document.id for document in read], tokens, params.tokenize.mode, params.tokenize.context
    )
    ends = windows.offsets[1:-1]
    sequences = np.split(windows.tokens, ends)
    with watched(context, "steps", training.steps) as tick:
        losses = train_model(
            model,
            sequences,
            np.split(windows.supervised, ends),
            training,
            context.work / "trainer",
            params.runtime.device,
            tick,
        )
    tokenizer.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    store.write_json(
        context.out / "train.json",
        {
            **training.model_dump(),
            "vocabulary": len(tokenizer),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_sequences": len(sequences),
            "num_tokens": len(windows.tokens),
            "losses": losses,
        },
    )


def train_model(
    model: CausalLM,
    sequences: Sequence[NDArray[np.int32]],
    supervised: Sequence[NDArray[np.bool_]],
    training: Training,
    work: Path,
    device: str,
    tick: Callable[..., None] = lambda _steps, cached=False: None,
) -> list[dict[str, float]]:
    """Train in place with AdamW, a short warm-up and a cosine decay.

    `tick(steps, cached)` is told of steps done, `cached` of those of a training that goes on. The
    Trainer's own checkpoints in `work` let a killed training go on, to the same weights.

    Returns:
        The mean loss, nats a token, since the step before, at about fifty steps.
    """
    # Some sequences have no target, as those of one token; a batch of such would have no loss.
    rows = [
        (torch.from_numpy(row.astype(np.int64)), torch.from_numpy(targets))
        for row, targets in zip(sequences, supervised, strict=True)
        if targets.any()
    ]
    trainer = transformers.Trainer(
        model=model,
        args=_arguments(training, work, device),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]  a list serves as a dataset
        data_collator=_collate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_Ticks(tick))
    trainer.train(resume_from_checkpoint=_resumable(work))
    return [
        {"step": entry["step"], "loss": entry["loss"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _arguments(training: Training, work: Path, device: str) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.steps // 20,
        seed=training.seed % 2**32,  # the range of NumPy's generator, which is seeded too
        use_cpu=device == "cpu" or not torch.cuda.is_available(),
        logging_steps=max(1, training.steps // 50),
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def _resumable(work: Path) -> str | None:
    """The Trainer's last whole checkpoint; what a kill left half-written is removed."""
    folders = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in reversed(folders):
        if (folder / "trainer_state.json").is_file():  # written last
            return str(folder)
        shutil.rmtree(folder)
    return None


class _Ticks(transformers.TrainerCallback):
    """Counts steps."""

    def __init__(self, tick: Callable[..., None]) -> None:
        self._tick = tick

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Those of a training that goes on."""
        if state.global_step:
            self._tick(state.global_step, cached=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more."""
        self._tick(1)


def _collate(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; under causal attention no real position sees the padding."""
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [tokens.masked_fill(~targets, _IGNORED) for tokens, targets in rows]
    return {
        "input_ids": pad([tokens for tokens, _ in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=_IGNORED),
    }
