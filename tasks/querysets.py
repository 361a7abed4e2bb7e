"""Queries: a prompt and its completion, split into tokens where the completion begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.records import Record, records

if TYPE_CHECKING:  # transformers is slow to import, and to check a query set needs no tokenizer
    from tasks.models import Tokenizer


@dataclass(frozen=True, slots=True)
class QueryText:
    """A query as written and as tokens; `extra` holds the other fields of its line."""

    name: str
    prompt: str
    completion: str
    extra: dict[str, Any]
    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    contrast: str = ""
    contrast_tokens: tuple[int, ...] = ()


def load_queries(
    path: Path, tokenizer: "Tokenizer", bos: bool, context: int | None
) -> list[QueryText]:
    """Read and tokenise a query set, one JSON object a line with name, prompt and completion, and
    where it is the difference to another completion that counts, that one as `contrast`.

    Prompt and completion are tokenised as one text, as the model would meet them, and split at
    the character where the completion begins: a token across that border is the completion's.

    Args:
        path: a .jsonl or .jsonl.gz file.
        tokenizer: the model's.
        bos: put the beginning-of-sequence token first, as in the corpus.
        context: the longest query the model can read, in tokens; None for no limit.

    Raises:
        ValueError: naming file and line, for every query that cannot be measured.
    """
    queries = [_tokenise(record, tokenizer, bos, context) for record in check_queries(path)]
    return queries


def check_queries(path: Path) -> list[Record]:
    """The lines of a query set, checked as far as that needs no tokenizer.

    Raises:
        ValueError: a missing, empty or non-text name, prompt or completion; two queries with one
            name; no query at all.
    """
    found: dict[str, Record] = {}
    for record in records(path):
        for key in ("name", "prompt", "completion"):
            _check_text(record, key)
        if record.fields.get("contrast") is not None:
            _check_text(record, "contrast")
            if record.fields["contrast"] == record.fields["completion"]:
                raise ValueError(
                    f"{record.place}: the contrast is the completion, so that f is 0; give another"
                )
        name = record.fields["name"]
        if name in found:
            raise ValueError(
                f"{record.place}: the name {name!r} was already used at {found[name].place}; "
                "every query wants a name of its own"
            )
        found[name] = record
    if not found:
        raise ValueError(f"query.path: {path} holds no queries; at least one is wanted")
    return list(found.values())


def _check_text(record: Record, key: str) -> None:
    if key not in record.fields:
        there = ", ".join(map(repr, record.fields)) or "none"
        raise ValueError(
            f"{record.place}: the query has no {key!r}; fields there: {there}; "
            "'name', 'prompt' and 'completion' are wanted"
        )
    value = record.fields[key]
    if not isinstance(value, str):
        raise ValueError(
            f"{record.place}: {key!r} holds a {type(value).__name__}; a string is wanted"
        )
    if not value:
        raise ValueError(f"{record.place}: the query's {key} is empty; some text is wanted")


def _tokenise(record: Record, tokenizer: "Tokenizer", bos: bool, context: int | None) -> QueryText:
    fields = dict(record.fields)
    name, prompt, completion = (fields.pop(key) for key in ("name", "prompt", "completion"))
    contrast = fields.pop("contrast", None) or ""
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
    return QueryText(name, prompt, completion, fields, asked, said, contrast, instead)


def _parted(
    tokenizer: "Tokenizer", prompt: str, completion: str, bos: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of both together, parted where the completion begins."""
    from tasks.models import boundary_token

    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    # The first token that reaches past the prompt begins the completion, even across the border.
    border = next(
        (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)),
        len(tokens),
    )
    start = [boundary_token(tokenizer, "bos")] if bos else []
    return (*start, *tokens[:border]), tuple(tokens[border:])


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
            "tokenize.bos: true adds; take it out of the prompt"
        )
    length = len(asked) + len(said)
    if context is not None and length > context:
        raise ValueError(
            f"{place}: query {name!r} is {length} tokens long "
            f"({len(asked)} prompt, {len(said)} completion), "
            f"{length - context} more than the context of {context}; shorten the prompt"
        )
