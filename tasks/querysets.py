"""Queries: a prompt and its completion, split into tokens where the completion begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.querylines import check_queries, given
from tasks.records import Record

if TYPE_CHECKING:  # transformers is slow to import, and to check a query set needs no tokenizer
    from tasks.models import Tokenizer

# Given name, prompt tokens and number of tokens, the text that a model goes on with.
Continue = Callable[[str, tuple[int, ...], int], str]

OWN = ("name", "prompt", "completion", "contrast", "messages", "generate", "tags", "expected")


@dataclass(frozen=True, slots=True)
class QueryText:
    """A query as written and as tokens.

    Attributes:
        name: its own in the set.
        prompt, completion: texts; of a conversation, in the words of the chat template.
        extra: the other fields of its line.
        prompt_tokens, completion_tokens: the same as the model meets them.
        contrast, contrast_tokens: the other completion; empty if there is none.
        tags: words to find it by.
        expected: what ought to be found: ids of documents or sequences, or metadata to match.
        is_generated: whether the model wrote the completion itself.
    """

    name: str
    prompt: str
    completion: str
    extra: dict[str, Any]
    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    contrast: str = ""
    contrast_tokens: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()
    expected: tuple[str | Mapping[str, Any], ...] = ()
    is_generated: bool = False


def load_queries(
    path: Path,
    tokenizer: "Tokenizer",
    bos: bool,
    context: int | None,
    goes_on: Continue | None = None,
) -> list[QueryText]:
    """Read and tokenise a query set: one JSON object a line, as `check_queries` wants it.

    Prompt and completion are tokenised as one text, as the model would meet them, and split at
    the character where the completion begins: a token across that border is the completion's.

    Args:
        path: a .jsonl or .jsonl.gz file.
        tokenizer: the model's.
        bos: put the beginning-of-sequence token first, as in the corpus.
        context: the longest query the model can read, in tokens; None for no limit.
        goes_on: writes the completions that lines leave to the model; None: such a line is an
            error.

    Raises:
        ValueError: naming file and line, for every query that cannot be measured.
    """
    return [_tokenise(record, tokenizer, bos, context, goes_on) for record in check_queries(path)]


def _tokenise(
    record: Record,
    tokenizer: "Tokenizer",
    bos: bool,
    context: int | None,
    goes_on: Continue | None,
) -> QueryText:
    name, length = record.fields["name"], given(record, "generate")
    prompt, completion, contrast = _texts(record, tokenizer)
    if length is not None:
        completion = _continued(record, tokenizer, prompt, bos, context, goes_on)
    asked, said = _parted(tokenizer, prompt, completion, bos)
    instead: tuple[int, ...] = ()
    _check_tokens(record.place, name, completion, asked, said, bos, context)
    if contrast:
        of_contrast, instead = _parted(tokenizer, prompt, contrast, bos)
        _check_tokens(record.place, name, contrast, of_contrast, instead, bos, context)
        if of_contrast != asked:
            raise ValueError(
                f"{record.place}: the prompt of query {name!r} has other tokens before its "
                "contrast than before its completion: a token reaches across the border; "
                "move the border to a space"
            )
        if instead == said:
            raise ValueError(
                f"{record.place}: the contrast of query {name!r} is what the model writes itself, "
                "so that f is 0; give another"
            )
    return QueryText(
        name,
        prompt,
        completion,
        {key: value for key, value in record.fields.items() if key not in OWN},
        asked,
        said,
        contrast,
        instead,
        tuple(given(record, "tags") or ()),
        tuple(given(record, "expected") or ()),
        length is not None,
    )


def _texts(record: Record, tokenizer: "Tokenizer") -> tuple[str, str, str]:
    """Prompt, completion and contrast; empty, what the line does not say."""
    contrast, messages = given(record, "contrast") or "", given(record, "messages")
    if messages is None:
        return record.fields["prompt"], given(record, "completion") or "", contrast
    if given(record, "generate") is not None:
        return _opened(record, tokenizer, messages), "", contrast
    prompt, completion = _turn(record, tokenizer, messages)
    if contrast:
        last = {**messages[-1], "content": contrast}
        contrast = _turn(record, tokenizer, [*messages[:-1], last])[1]
    return prompt, completion, contrast


def _turn(
    record: Record, tokenizer: "Tokenizer", messages: list[dict[str, Any]]
) -> tuple[str, str]:
    """A conversation up to the assistant's last turn, and that turn to the end of what it says."""
    from tasks.corpora import Document
    from tasks.marks import marked

    document = Document(record.fields["name"], "", {}, record.place, messages=tuple(messages))
    written = marked(tokenizer, document)
    assert written.stretches is not None
    start, end = written.stretches[-1]
    return written.text[:start], written.text[start:end]


def _opened(record: Record, tokenizer: "Tokenizer", messages: list[dict[str, Any]]) -> str:
    from tasks.corpora import Document
    from tasks.marks import opened

    return opened(
        tokenizer,
        Document(record.fields["name"], "", {}, record.place, messages=tuple(messages)),
    )


def _continued(
    record: Record,
    tokenizer: "Tokenizer",
    prompt: str,
    bos: bool,
    context: int | None,
    goes_on: Continue | None,
) -> str:
    """What the model says after the prompt."""
    name, length = record.fields["name"], record.fields["generate"]
    if goes_on is None:
        raise ValueError(
            f"{record.place}: query {name!r} leaves its completion to the model, and there is none "
            "here; give a completion"
        )
    tokens = _start(tokenizer, bos) + tuple(
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )
    if context is not None and len(tokens) + length > context:
        raise ValueError(
            f"{record.place}: the prompt of query {name!r} is {len(tokens)} tokens long, and "
            f"{length} more are to be generated: {len(tokens) + length - context} more than the "
            f"context of {context}; shorten the prompt or lower 'generate'"
        )
    text = goes_on(name, tokens, length)
    if not text:
        raise ValueError(
            f"{record.place}: the model says nothing after the prompt of query {name!r}: it ends "
            "the text at once; give a completion"
        )
    return text


def _start(tokenizer: "Tokenizer", bos: bool) -> tuple[int, ...]:
    from tasks.models import boundary_token

    return (boundary_token(tokenizer, "bos"),) if bos else ()


def _parted(
    tokenizer: "Tokenizer", prompt: str, completion: str, bos: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of both together, parted where the completion begins."""
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    # The first token that reaches past the prompt begins the completion, even across the border.
    border = next(
        (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)),
        len(tokens),
    )
    return (*_start(tokenizer, bos), *tokens[:border]), tuple(tokens[border:])


def _check_tokens(
    place: str,
    name: str,
    completion: str,
    asked: tuple[int, ...],
    said: tuple[int, ...],
    bos: bool,
    context: int | None,
) -> None:
    if not said:
        raise ValueError(f"{place}: the completion {completion!r} of query {name!r} gives no token")
    if len(asked) == int(bos):
        raise ValueError(
            f"{place}: no token of query {name!r} lies in the prompt alone: its first token "
            "reaches into the completion; move the border, or lengthen the prompt"
        )
    if bos and asked[1] == asked[0]:
        raise ValueError(
            f"{place}: the prompt of query {name!r} begins with the BOS token, which "
            "tokenize.bos: true adds; take it out of the prompt, or set tokenize.bos to false "
            "where a chat template writes it"
        )
    length = len(asked) + len(said)
    if context is not None and length > context:
        raise ValueError(
            f"{place}: query {name!r} is {length} tokens long "
            f"({len(asked)} prompt, {len(said)} completion), "
            f"{length - context} more than the context of {context}; shorten the prompt"
        )
