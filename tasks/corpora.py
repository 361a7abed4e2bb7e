"""The corpus: documents, and which of their text a model is to predict.

Every fault of the input names the file, the line, what was found and what was wanted.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import material
from tasks.faraway import is_far
from tasks.records import DataFile, Record, data_files, unread

ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where the documents are and how to read them.

    Args:
        path: a file or a folder of them, here or behind a URL (`tasks.records`).
        keys: the key in a record of each part of a document: `text`, or `prompt` and `completion`,
            or `messages`.
        id: the key of the document's name; None names a document ``file:line``.
        limit: read only so many documents; None reads all.
        separator: of the documents of a .txt file.
    """

    path: Path | str
    keys: Mapping[str, str] = field(default_factory=lambda: {"text": "text"})
    id: str | None = None
    limit: int | None = None
    separator: str | None = None

    @classmethod
    def of(cls, section: material.Corpus, root: Path) -> "Corpus":
        """The corpus of a run; a path is relative to the project's root."""
        given = section.model_dump()
        keys = {part: given[part] for part in ("text", "prompt", "completion", "messages")
                if part in given}  # fmt: skip
        path = section.path if is_far(section.path) else root / section.path
        return cls(path, keys, section.id, section.limit, given.get("separator"))


@dataclass(frozen=True, slots=True)
class Document:
    """One record of the corpus; `metadata` holds its other fields.

    Args:
        id: its name.
        text: all of it; empty where there are `messages`, which a tokenizer makes a text of.
        metadata: as above.
        place: file and line.
        prompt: how many characters at the start of the text are no target.
        messages: of a conversation, each with `role` and `content`.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    place: str
    prompt: int = 0
    messages: tuple[dict[str, Any], ...] = ()


def documents(corpus: Corpus, files: Iterable[DataFile] | None = None) -> Iterator[Document]:
    """The documents of a corpus, up to its limit, as they are read.

    Args:
        corpus: what is read, and how.
        files: some of the corpus's, of a corpus without a limit; None: all.

    Raises:
        ValueError: a record that is no document (file, line, what it lacks), or an unreadable path.
    """
    files = data_files(corpus.path) if files is None else files
    for each in itertools.islice(unread(files, corpus.separator), corpus.limit):
        yield _document(each.read(), corpus)


def read_all(corpus: Corpus) -> list[Document]:
    """Every document, in memory.

    Raises:
        ValueError: as `documents` and `check_ids`.
    """
    read = list(documents(corpus))
    check_ids(corpus, ((document.id, document.place) for document in read))
    return read


def check_ids(corpus: Corpus, named: Iterable[tuple[str, str]]) -> None:
    """Whether there are documents, and every one has an id of its own.

    Args:
        corpus: that they are of.
        named: id and place of each.

    Raises:
        ValueError: naming both places, or the corpus, if it is empty.
    """
    seen: dict[str, str] = {}
    for name, place in named:
        if name in seen:
            raise ValueError(
                f"{place}: document id {name!r} was already used at {seen[name]}; ids must be "
                "unique (or set corpus.id to null to name documents by file and line)"
            )
        seen[name] = place
    if not seen:
        example = ", ".join(f"{json.dumps(key)}: ..." for key in corpus.keys.values())
        raise ValueError(
            f"corpus.path: {corpus.path} holds no documents; at least one line with a JSON object "
            f"such as {{{example}}} is wanted"
        )


def _document(record: Record, corpus: Corpus) -> Document:
    fields = dict(record.fields)
    found = {
        part: _take(record, fields, key, f"corpus.{part}") for part, key in corpus.keys.items()
    }
    texts = [
        _text(record, key, found[part], f"corpus.{part}")
        for part, key in corpus.keys.items()
        if part != "messages"
    ]
    name = record.place if corpus.id is None else _id(record, fields, corpus.id)
    prompt = len(texts[0]) if "prompt" in found else 0
    if prompt and not texts[1]:
        raise ValueError(
            f"{record.place}: the completion is empty, so that nothing would be predicted; leave "
            "the line out"
        )
    messages = ()
    if "messages" in found:
        messages = _conversation(record, corpus.keys["messages"], found["messages"])
    return Document(name, "".join(texts), fields, record.place, prompt, messages)


def _text(record: Record, key: str, value: Any, setting: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{record.place}: field {key!r} ({setting}) holds a "
            f"{type(value).__name__}; a string is wanted"
        )
    return value


def _id(record: Record, fields: dict[str, Any], key: str) -> str:
    name = _take(record, fields, key, "corpus.id")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(
            f"{record.place}: field {key!r} (corpus.id) holds {name!r}; "
            "a string or a whole number is wanted"
        )
    return str(name)


def _conversation(record: Record, key: str, value: Any) -> tuple[dict[str, Any], ...]:
    messages = checked_messages(record, f"field {key!r} (corpus.messages)", value)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError(
            f"{record.place}: no message of field {key!r} has the role {ASSISTANT!r}, so that "
            "nothing would be predicted; leave the conversation out, or rename the role"
        )
    return messages


def checked_messages(record: Record, shown: str, value: Any) -> tuple[dict[str, Any], ...]:
    """The messages of a conversation; `shown` is what an error calls the field.

    Raises:
        ValueError: naming the place, if it is no list of messages with role and content.
    """
    wanted = "a list of messages such as {'role': 'user', 'content': '...'} is wanted"
    if not isinstance(value, list) or not value:
        found = "nothing" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{record.place}: {shown} holds {found}; {wanted}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(part), str) for part in ("role", "content")
        ):
            raise ValueError(
                f"{record.place}: message {number} of {shown} is {str(message)[:60]!r}; {wanted}"
            )
    return tuple(value)


def _take(record: Record, fields: dict[str, Any], key: str, setting: str) -> Any:
    if key not in fields:
        there = ", ".join(map(repr, record.fields)) or "none"
        raise ValueError(
            f"{record.place}: no field {key!r}, which {setting} names; fields there: {there}"
        )
    return fields.pop(key)
