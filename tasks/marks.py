"""The text of a document as a model sees it, and which of it the model is to predict."""

from dataclasses import dataclass

from tasks.corpora import ASSISTANT, Document
from tasks.models import Tokenizer


@dataclass(frozen=True, slots=True)
class Marked:
    """A text, and the stretches of characters that are targets; None: all of it."""

    text: str
    stretches: tuple[tuple[int, int], ...] | None = None

    @property
    def is_plain(self) -> bool:
        return self.stretches is None

    def reached(self, start: int, end: int) -> bool:
        """Whether a token of these characters reaches into a target: one across a border does."""
        if self.stretches is None:
            return True
        return any(end > first and start < last for first, last in self.stretches)


def marked(tokenizer: Tokenizer, document: Document) -> Marked:
    """Text, prompt and completion, or a conversation in the words of the tokenizer's template.

    Raises:
        ValueError: naming the document, if the tokenizer has no template, or one that does not
            build up its text.
    """
    if document.messages:
        return _conversation(tokenizer, document)
    if document.prompt:
        return Marked(document.text, ((document.prompt, len(document.text)),))
    return Marked(document.text)


def opened(tokenizer: Tokenizer, document: Document) -> str:
    """A conversation in the words of the template, up to where the assistant's turn begins."""
    _check_template(tokenizer, document)
    return _rendered(tokenizer, document, len(document.messages), opens_turn=True)


def _check_template(tokenizer: Tokenizer, document: Document) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{document.place}: messages want a chat template, and the tokenizer has none; give a "
            "checkpoint whose tokenizer_config.json or chat_template.jinja holds one"
        )


def _conversation(tokenizer: Tokenizer, document: Document) -> Marked:
    """What an assistant says: from where its turn is opened to its end, white space after it left
    out. Where that is, the template tells by what it makes of the messages so far."""
    _check_template(tokenizer, document)
    whole = _rendered(tokenizer, document, len(document.messages))
    stretches = []
    for number, message in enumerate(document.messages):
        if message["role"] != ASSISTANT:
            continue
        opened = _rendered(tokenizer, document, number, opens_turn=True)
        closed = _rendered(tokenizer, document, number + 1)
        if not (whole.startswith(opened) and whole.startswith(closed) and closed > opened):
            raise ValueError(
                f"{document.place}: the tokenizer's chat template writes message {number + 1} of "
                f"document {document.id!r} otherwise once others follow, so it cannot be told what "
                "the assistant said there; split the conversation so that this is its last message"
            )
        stretches.append((len(opened), len(closed.rstrip())))
    return Marked(whole, tuple(stretches))


def _rendered(
    tokenizer: Tokenizer, document: Document, num_messages: int, opens_turn: bool = False
) -> str:
    messages = list(document.messages[:num_messages])
    if not messages and not opens_turn:
        return ""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opens_turn
        )
    except Exception as error:  # a template raises what it likes, of roles that must alternate
        raise ValueError(
            f"{document.place}: the tokenizer's chat template refuses document {document.id!r} "
            f"({error}); write its messages as the template takes them: most take a user's first, "
            "then user and assistant in turn"
        ) from error
    assert isinstance(text, str)
    return text
