"""Token ids to text pieces: a token's characters are those that become readable with it.

1. Byte-level and byte-fallback tokens are bytes. They go through an incremental UTF-8 decoder: a character
   split over tokens is owned by the token that completes it, the fragments before own nothing, and bytes that
   can never become a character turn into U+FFFD as soon as that is certain.
2. Any other token is decoded next to the token before it, and what that adds is its text (a sentencepiece `▁`
   is a space in the middle of a text and nothing at its start).
3. For text that is given, the tokenizer's character offsets say the same: `encode_text` turns them into
   pieces that tile the text, each character owned by the last token whose span holds it.

Pieces always tile the text they make: joined, they are the text. Time and memory are O(1) per token; nothing
is ever decoded twice. Special tokens are text like any other.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.steps import refuse_half_characters


class TextPiece(NamedTuple):
    """The characters that became readable with one token.

    `is_fragment` is true when the token holds bytes of a character that a later token completes and no
    character of its own; the text is empty then. A token can also be empty without being a fragment.
    """

    text: str
    is_fragment: bool


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The visible character that byte-level tokenizers write for each byte, inverted.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


def _decoder_kinds(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {state["type"], *(inner["type"] for inner in state.get("decoders", ()))}


class TokenDecoder:
    """Incremental decoding of one token stream."""

    def __init__(self, tokenizer: Any) -> None:
        """Start at the beginning of a stream of a transformers tokenizer's ids."""
        self.tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_fallback = "ByteFallback" in kinds
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._previous: int | None = None

    def push(self, token_id: int) -> TextPiece:
        """Take one token id; return the text that becomes readable with it."""
        token_id = int(token_id)
        data = self._bytes(token_id)
        if data is None:
            text = self._utf8.decode(b"", final=True) + self._added_text(token_id)
            self._utf8.reset()
        else:
            text = self._utf8.decode(data)
        self._previous = token_id
        return TextPiece(text, is_fragment=not text and bool(self._utf8.getstate()[0]))

    def finish(self) -> str:
        """What bytes left over at the end of the stream become: nothing, or U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def clone(self) -> "TokenDecoder":
        """An independent copy of the stream's state."""
        twin = object.__new__(TokenDecoder)
        twin.__dict__.update(self.__dict__)
        twin._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        twin._utf8.setstate(self._utf8.getstate())
        return twin

    def _bytes(self, token_id: int) -> bytes | None:
        if not (self._is_byte_level or self._has_byte_fallback):
            return None
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # an id inside the model's padded vocabulary that no token carries
            return b""
        if self._is_byte_level:
            alphabet = _byte_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
            return token.encode()
        match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        return bytes([int(match[1], 16)]) if match else None

    def _added_text(self, token_id: int) -> str:
        if self._previous is None:
            return self._decode([token_id])
        before, both = self._decode([self._previous]), self._decode([self._previous, token_id])
        return both[len(before) :] if both.startswith(before) else self._decode([token_id])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_tokens(tokenizer: Any, token_ids: Iterable[int]) -> tuple[list[TextPiece], str]:
    """One piece per token, and what bytes left over at the end become (nothing, or U+FFFD).

    That rest belongs to the last token. Pieces and rest join to the text.
    """
    decoder = TokenDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in token_ids]
    return pieces, decoder.finish()


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[TextPiece]]:
    """Tokenise a text once and say which characters each token owns.

    Args:
        tokenizer: A fast transformers tokenizer. No special tokens are added; those written in the text are
            read.
        text: The whole text.

    Returns:
        Token ids, and as many pieces, which join to `text`.

    Raises:
        TraceError: The tokenizer is not a fast one, the text yields no token, or it holds half a character.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TraceError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed to build a "
            "trace from text. Load it with use_fast=True, or pass token ids to ReasoningTrace.from_tokens."
        )
    refuse_half_characters(text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    if not ids:
        raise TraceError(f"The text {text[:40]!r} yields no token; a trace needs at least one.")
    return ids, _pieces_from_offsets(text, encoding["offset_mapping"])


def _pieces_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[TextPiece]:
    # A token's text ends where the next token that has characters begins: so a character listed for several
    # tokens goes to the last of them, and characters listed for none (stripped spaces) to the token after
    # them.
    ends, limit = [0] * len(offsets), len(text)
    for index in range(len(offsets) - 1, -1, -1):
        start, end = offsets[index]
        ends[index] = min(end, limit)
        if end > start:
            limit = min(limit, start)
    ends[-1] = len(text)
    pieces, position = [], 0
    for (first, last), end in zip(offsets, ends, strict=True):
        end, has_span = max(position, end), last > first
        pieces.append(TextPiece(text[position:end], is_fragment=has_span and end == position))
        position = end
    return pieces
