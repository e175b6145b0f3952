"""From token ids to text, one token at a time, never splitting a character.

An answer continues its prompt, so its text is what decoding prompt and answer together adds to
decoding the prompt: a first token "▁world" gives " world". Special tokens give no text.

Most decoders map each token to bytes, whatever stands around it; then a token costs one table
look-up and one step of an incremental UTF-8 decoder. The others decode a short sliding window.
Invalid UTF-8 becomes U+FFFD as `bytes.decode(errors="replace")` does it. That is also what the
byte-level decoder does; the byte-fallback decoder would turn a whole run of byte tokens into
U+FFFD for one bad byte, so it could show no character of a run before the run's end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

WINDOW_ANCHOR_TOKENS = 6
"""Prompt tokens that a window starts with, so that the answer is decoded as a continuation."""
WINDOW_HELD_TOKENS = 24
"""A window is shown after so many tokens even if it ends within a character: keeps cost bounded."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one answer, token by token."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back: an incomplete character shows as U+FFFD."""
        ...


class Vocabulary:
    """What the gateway needs of a tokenizer besides encoding: texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._pieces = _byte_pieces(tokenizer, frozenset(self._special))
        spellings = sorted((text for text in self._special.values() if len(text) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        keeps_length = self._pieces is not None and tokenizer.normalizer is None
        self._longest_bytes = max(map(len, self._pieces or [b""])) if keeps_length else 0

    @property
    def is_bytewise(self) -> bool:
        """True where each token stands for the same bytes everywhere."""
        return self._pieces is not None

    def is_special(self, token_id: int) -> bool:
        """True for tokens that give no text."""
        return token_id in self._special

    def disarmed(self, text: str, seam: str) -> str:
        """The text with `seam` put into each spelling of a special token, so that none is left."""
        while self._control.search(text):
            text = self._control.sub(lambda found: found[0][0] + seam + found[0][1:], text)
        return text

    def fewest_tokens(self, text: str) -> int:
        """A bound from below, without tokenising; 0 where nothing can be said."""
        return len(text) // self._longest_bytes if self._longest_bytes else 0

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for an answer to this prompt."""
        if self._pieces is not None:
            return BytewiseDetokenizer(self._pieces)
        return WindowDetokenizer(self.tokenizer, prompt_token_ids)

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """A token's text (with U+FFFD where it is not valid UTF-8 alone) and its bytes."""
        if token_id in self._special:
            text = self._special[token_id]
            return text, text.encode()
        if self._pieces is None:
            text = self.tokenizer.decode([token_id], skip_special_tokens=False)
            return text, text.encode()
        raw = self._pieces[token_id] if token_id < len(self._pieces) else b""
        return raw.decode(errors="replace"), raw


class BytewiseDetokenizer:
    """For decoders that give each token's bytes by a table."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        try:
            return self._decode(self._pieces[token_id])
        except IndexError:  # A padded vocabulary: ids above the tokenizer's have no text.
            return ""

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other decoder: decodes the last shown tokens and the new ones together."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._ids = list(prompt_token_ids[-WINDOW_ANCHOR_TOKENS:])
        self._shown_ids = len(self._ids)
        self._shown = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        held = len(self._ids) - self._shown_ids
        if text.endswith("\ufffd") and held < WINDOW_HELD_TOKENS:
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._ids = self._ids[-max(WINDOW_ANCHOR_TOKENS, len(self._ids) - self._shown_ids) :]
            self._shown = self._decode(self._ids)
        else:
            self._shown = text
        self._shown_ids = len(self._ids)
        return new


def _byte_pieces(tokenizer: Tokenizer, special: frozenset[int]) -> list[bytes] | None:
    """Each id's bytes (empty for special tokens and gaps), or None where the decoder is not bytewise."""
    if tokenizer.decoder is None:
        return None
    encode = _piece_encoder(json.loads(tokenizer.decoder.__getstate__()))
    if encode is None:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index not in special:
            pieces[index] = encode(token)
    return pieces


def _piece_encoder(decoder: dict[str, Any]) -> Any:
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return _ByteLevelPieces().encode
    replacements: list[tuple[str, str]] = []
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Strip" and step["stop"] == 0:
            continue  # Strips the start of the text, which is not the start of an answer.
        elif step["type"] not in ("ByteFallback", "Fuse"):
            return None
    if not replacements and "ByteFallback" not in names:
        return None
    falls_back = "ByteFallback" in names

    def encode(token: str) -> bytes:
        matched = _BYTE_TOKEN.fullmatch(token) if falls_back else None
        if matched:
            return bytes([int(matched[1], 16)])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token.encode()

    return encode


class _ByteLevelPieces:
    """The byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and up."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [value for value in range(256) if value not in set(printable)]
        self._bytes = {chr(value): value for value in printable}
        self._bytes.update({chr(0x100 + rank): value for rank, value in enumerate(others)})

    def encode(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # An added token, kept as it was given.
            return token.encode()
