"""The sections `corpus` and `tokenize` of a params file: what is read, and what becomes of it."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Tag

from tasks.faraway import checked
from tasks.section import Count, Section, Text, by_key


class _Files(Section):
    path: Annotated[Text, AfterValidator(checked)] = Field(
        description="file or folder: .jsonl, .txt (also .gz, .zst), .parquet, or a saved dataset, "
        "or the URL of one: s3://…, gs://…, hf://datasets/organisation/name@<sha>/…"
    )
    id: Text | None = Field(description="the key of the document's id; null: file:line")
    limit: Count | None = Field(description="read this many documents; null: all")


class TextCorpus(_Files):
    """Plain text: every token is a target."""

    text: Text = Field(description="the key of the text in a line")
    separator: Text | None = Field(
        description="of a .txt file: what stands between two documents; null: a file is a document"
    )


class PairCorpus(_Files):
    """A prompt and its completion: the tokens of the completion are targets."""

    prompt: Text = Field(description="the key of the prompt in a line")
    completion: Text = Field(description="the key of the completion")


class ChatCorpus(_Files):
    """Conversations: what the assistant says is a target."""

    messages: Text = Field(description="the key of a list of {role, content}")


Corpus = Annotated[
    Annotated[TextCorpus, Tag("<text>")]
    | Annotated[PairCorpus, Tag("<prompt>")]
    | Annotated[ChatCorpus, Tag("<messages>")],
    by_key(text="<text>", prompt="<prompt>", messages="<messages>"),
]


class Tokenize(Section):
    """Documents to sequences."""

    mode: Literal["document", "pack"]
    context: int = Field(ge=2, description="tokens of a sequence, at most")
    bos: bool = Field(description="begin each document with the tokenizer's bos")
    eos: bool = Field(description="end each document with the tokenizer's eos")
