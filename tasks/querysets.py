"""Queries: a prompt and its completion, split into tokens where the completion begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.corpora import Record, records

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


def load_queries(
    path: Path, tokenizer: "Tokenizer", bos: bool, context: int | None
) -> list[QueryText]:
    """Read and tokenise a query set, one JSON object a line with name, prompt and completion.

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
    from tasks.models import boundary_token

    fields = dict(record.fields)
    name, prompt, completion = (fields.pop(key) for key in ("name", "prompt", "completion"))
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    # The first token that reaches past the prompt begins the completion, even across the border.
    border = next(
        (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)),
        len(tokens),
    )
    start = [boundary_token(tokenizer, "bos")] if bos else []
    query = QueryText(
        name, prompt, completion, fields, (*start, *tokens[:border]), tuple(tokens[border:])
    )
    _check_tokens(record.place, query, bos, context)
    return query


def _check_tokens(place: str, query: QueryText, bos: bool, context: int | None) -> None:
    if not query.completion_tokens:
        raise ValueError(
            f"{place}: the completion {query.completion!r} of query {query.name!r} gives no token"
        )
    if len(query.prompt_tokens) == int(bos):
        raise ValueError(
            f"{place}: no token of query {query.name!r} lies in the prompt alone: its first token "
            "reaches into the completion; move the border, or lengthen the prompt"
        )
    if bos and query.prompt_tokens[1] == query.prompt_tokens[0]:
        raise ValueError(
            f"{place}: the prompt of query {query.name!r} begins with the BOS token, which "
            "tokenize.bos: true adds; take it out of the prompt"
        )
    length = len(query.prompt_tokens) + len(query.completion_tokens)
    if context is not None and length > context:
        raise ValueError(
            f"{place}: query {query.name!r} is {length} tokens long "
            f"({len(query.prompt_tokens)} prompt, {len(query.completion_tokens)} completion), "
            f"{length - context} more than the context of {context}; shorten the prompt"
        )
