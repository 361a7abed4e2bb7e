"""A run's queries, with what the model itself says where a line leaves the completion to it."""

from dataclasses import dataclass, field
from typing import cast

from tasks import store
from tasks.checkpoints import ModelReference
from tasks.models import (
    Tokenizer,
    continuation_text,
    generate_greedy,
    load_tokenizer,
    model_for_thread,
)
from tasks.precision import DTYPES, resolve_device
from tasks.querysets import QueryText, load_queries
from tasks.workspace import StageContext

COMPLETIONS = "completions.json"  # in the folder of a stage's partial results


def queries_of(context: StageContext, model: ModelReference) -> list[QueryText]:
    """The run's queries, tokenised as its corpus was.

    Completions that are generated are remembered beside the stage's partial results, so that its
    shards need not write them again.

    Raises:
        ValueError: naming file and line, for every query that cannot be measured.
    """
    params = context.params
    tokenizer = load_tokenizer(model.folder)
    file = context.work / COMPLETIONS
    known = store.read_json(file) if file.is_file() else {}
    writer = _Writer(
        model, tokenizer, resolve_device(params.runtime.device), params.runtime.dtype, known
    )
    found = load_queries(
        context.input(params.query.path), tokenizer, params.tokenize.bos, model.context, writer
    )
    if writer.written:
        store.write_json(file, known | writer.written)
    return found


@dataclass(slots=True)
class _Writer:
    """Goes on with a prompt greedily, unless it is known what comes."""

    model: ModelReference
    tokenizer: Tokenizer
    device: str
    dtype: str
    known: dict[str, str]
    written: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str, prompt: tuple[int, ...], length: int) -> str:
        if name not in self.known:
            model = model_for_thread(self.model, self.device, DTYPES[self.dtype])
            end = cast(int | None, self.tokenizer.eos_token_id)
            tokens = generate_greedy(model, prompt, length, end)
            self.written[name] = continuation_text(self.tokenizer, prompt, tokens)
        return self.known.get(name) or self.written[name]
