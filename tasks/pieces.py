"""The text of each token, for a reader: pieces that join into the text of the sequence."""

import codecs
import json
from collections.abc import Callable, Sequence

from tasks.models import Tokenizer


def decode_pieces(
    tokenizer: Tokenizer, tokens: Sequence[int], continued: bool = False
) -> list[str]:
    """One string a token; joined, the text, with special tokens such as <s> spelt out.

    A character whose bytes are spread over several tokens belongs to the last of them, and the
    others get an empty piece. Bytes that form no character, as where a window cuts one in two,
    show as U+FFFD.

    Args:
        tokenizer: the model's.
        tokens: ids of one sequence.
        continued: the sequence begins in the middle of a document. Some tokenizers put a space
            before every text; it is taken off again, but not from a text that only goes on.
    """
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        return _join_bytes(tokenizer, tokens, _byte_level, strip=False, continued=continued)
    if "Metaspace" in kinds or "ByteFallback" in kinds:
        strip = "Metaspace" in kinds or "Strip" in kinds
        return _join_bytes(tokenizer, tokens, _sentence_piece, strip, continued)
    return _by_difference(tokenizer, tokens)


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """The types of the steps of the tokenizer's decoder."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}


def _join_bytes(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    token_bytes: Callable[[str], bytes],
    strip: bool,
    continued: bool,
) -> list[str]:
    added = tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[str] = []
    begins = not continued
    for token, written in zip(tokens, tokenizer.convert_ids_to_tokens(list(tokens)), strict=True):
        if token in added:
            pieces.append(decoder.decode(added[token].content.encode()))
            begins = added[token].special
            continue
        piece = token_bytes(written)
        if begins and strip:
            piece = piece.removeprefix(b" ")
        pieces.append(decoder.decode(piece))
        begins = False
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _by_difference(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """For any other decoder: what each token adds to the decoded text."""
    pieces, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:end]), clean_up_tokenization_spaces=False)
        pieces.append(text[len(before) :])
        before = text
    return pieces


def _byte_of_character() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes with (Radford et al. 2019)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + place): byte for place, byte in enumerate(rest)
    }


_BYTE_OF_CHARACTER = _byte_of_character()
