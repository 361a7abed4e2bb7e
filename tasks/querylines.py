"""The lines of a query set, checked as far as that needs no tokenizer and no model."""

from pathlib import Path
from typing import Any

from tasks.corpora import ASSISTANT, checked_messages
from tasks.records import Record, records

WANTED = "'name', 'prompt' and 'completion' are wanted"
GENERATE = "or 'generate': 32, for up to 32 tokens of the model's own greedy completion"


def check_queries(path: Path) -> list[Record]:
    """The lines of a query set, in their order.

    A line has a `name`; `prompt` and `completion`, or `messages`, a conversation whose last
    message is what the assistant said. `generate`, a number of tokens, takes the place of the
    completion. `contrast`, `tags` and `expected` may stand beside; other fields are kept.

    Raises:
        ValueError: naming file and line: what is missing, empty, of the wrong kind or said twice;
            two queries with one name; no query at all.
    """
    found: dict[str, Record] = {}
    for record in records(path):
        _check_text(record, "name")
        _check_parts(record)
        _check_contrast(record)
        _check_tags(record)
        _check_expected(record)
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


def given(record: Record, key: str) -> Any:
    """A field that may be left out; null means the same."""
    return record.fields.get(key)


def _check_parts(record: Record) -> None:
    """What is asked, and what is said: each in one way."""
    generated = given(record, "generate")
    if generated is not None:
        _check_count(record, "generate")
    if given(record, "messages") is not None:
        for key in ("prompt", "completion"):
            if given(record, key) is not None:
                raise ValueError(
                    f"{record.place}: the query has 'messages' and {key!r}; take one of them"
                )
        _check_messages(record, generated is not None)
        return
    _check_text(record, "prompt")
    if generated is None:
        _check_text(record, "completion")
    elif given(record, "completion") is not None:
        raise ValueError(
            f"{record.place}: the query has 'completion' and 'generate'; take one of them: "
            "a completion that is given, or one that the model writes"
        )


def _check_messages(record: Record, generated: bool) -> None:
    messages = checked_messages(record, "'messages'", record.fields["messages"])
    said = messages[-1]["role"] == ASSISTANT
    if said and generated:
        raise ValueError(
            f"{record.place}: the last message is the assistant's, and 'generate' asks for another "
            "completion; take one of them away"
        )
    if not said and not generated:
        raise ValueError(
            f"{record.place}: the last message has the role {messages[-1]['role']!r}; the "
            f"completion is what the role {ASSISTANT!r} says last: add it, {GENERATE}"
        )
    if said and not messages[-1]["content"]:
        raise ValueError(f"{record.place}: the assistant's last message is empty; text is wanted")


def _check_contrast(record: Record) -> None:
    if given(record, "contrast") is None:
        return
    _check_text(record, "contrast")
    messages = given(record, "messages")
    said = messages[-1]["content"] if messages else given(record, "completion")
    if record.fields["contrast"] == said and given(record, "generate") is None:
        raise ValueError(
            f"{record.place}: the contrast is the completion, so that f is 0; give another"
        )


def _check_tags(record: Record) -> None:
    tags = given(record, "tags")
    if tags is None:
        return
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise ValueError(
            f"{record.place}: 'tags' holds {str(tags)[:60]!r}; a list of words is wanted, such as "
            '["facts", "geography"]'
        )
    if len(set(tags)) < len(tags):
        raise ValueError(f"{record.place}: 'tags' names {_twice(tags)!r} twice; once is enough")


def _check_expected(record: Record) -> None:
    expected = given(record, "expected")
    if expected is None:
        return
    wanted = (
        "a list of ids of documents or sequences, or of metadata to match, is wanted, such as "
        '["ts-12", {"title": "Anarchism"}]'
    )
    if not isinstance(expected, list) or not expected:
        raise ValueError(f"{record.place}: 'expected' holds {str(expected)[:60]!r}; {wanted}")
    for each in expected:
        if not (isinstance(each, str | dict) and each):
            raise ValueError(f"{record.place}: 'expected' names {str(each)[:60]!r}; {wanted}")


def _check_count(record: Record, key: str) -> None:
    value = record.fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{record.place}: {key!r} holds {value!r}; a number of tokens is wanted, 1 or more"
        )


def _check_text(record: Record, key: str) -> None:
    if key not in record.fields:
        there = ", ".join(map(repr, record.fields)) or "none"
        also = f" ({GENERATE})" if key == "completion" else ""
        raise ValueError(
            f"{record.place}: the query has no {key!r}; fields there: {there}; {WANTED}{also}"
        )
    value = record.fields[key]
    if not isinstance(value, str):
        raise ValueError(
            f"{record.place}: {key!r} holds a {type(value).__name__}; a string is wanted"
        )
    if not value:
        raise ValueError(f"{record.place}: the query's {key} is empty; some text is wanted")


def _twice(values: list[str]) -> str:
    return next(value for value in values if values.count(value) > 1)
