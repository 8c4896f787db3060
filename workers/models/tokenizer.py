"""A checkpoint's tokenizer: token ids to bytes and, as they are generated, to text.

The vocabulary comes from `tokenizer.json` alone (the `tokenizers` library's format). Three kinds of decoder are told
apart by that file's `decoder` entry: byte-level BPE (GPT-2's alphabet: Qwen, OLMoE, Llama 3), SentencePiece pieces with
U+2581 for a space and `<0xNN>` byte tokens (Llama 2, Mistral, Mixtral, Gemma), and anything else, which is decoded by
the library itself over a sliding window.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import llguidance
import tokenizers

from cluster.errors import CheckpointError, UnsupportedFieldError

SPACE = "\u2581"  # SentencePiece's visible space
REPLACEMENT = "\ufffd"
MAX_TOKEN_ID = 2**24  # a larger id is a corrupt file, not a vocabulary
WINDOW = 8  # tokens of context that the generic decoder is given

Kind = Literal["byte_level", "sentencepiece", "metaspace", "generic"]


class Tokenizer:
    """The tokenizer of a checkpoint folder (or of one `tokenizer.json`).

    `vocab_size` counts the tokenizer's ids (largest + 1); a model's vocabulary may be padded beyond it.
    Raises `CheckpointError` naming the file where it is missing or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: a checkpoint needs a tokenizer.json (save it with the `tokenizers` library, or "
                "with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`)"
            )
        try:
            text = file.read_text(encoding="utf-8")
            library = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(f"{file} is not a tokenizer that can be read: {error}") from error
        library.no_padding()
        library.no_truncation()
        self._library = library
        ids = library.get_vocab(with_added_tokens=True).values()
        if not ids or max(ids) >= MAX_TOKEN_ID:
            raise CheckpointError(f"{file} has {'no tokens' if not ids else f'a token id of {max(ids)}'}")
        self.vocab_size = max(ids) + 1
        self._tokens = [library.id_to_token(token_id) for token_id in range(self.vocab_size)]
        special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
        self.special_ids = frozenset(i for i, token in enumerate(self._tokens) if token in special)
        self._kind, self._strip = _decoder_kind(decoder)
        self._byte_fallback = "ByteFallback" in json.dumps(decoder)
        self._byte_values = _byte_values(self._tokens) if self._byte_fallback else {}
        self._bytes = self._byte_table()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text, wherever it stands in it; empty for an id that is no token."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids that are no tokens add nothing."""
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        text: str = self._library.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as it is, nothing added; special tokens in it are found."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def grammar_tokenizer(self, eos_token_ids: Sequence[int]) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance wants it: special tokens match no text, `eos_token_ids` end a grammar.

        An EOS id beyond the tokenizer's own vocabulary cannot be generated under a grammar and is left out. Raises
        `UnsupportedFieldError` where tokens are not plain pieces of text (WordPiece), or where there is no EOS.
        """
        eos = [token_id for token_id in eos_token_ids if 0 <= token_id < self.vocab_size]
        if self._kind not in ("byte_level", "sentencepiece") or not eos:
            reason = "has no end-of-sequence token" if not eos else "is neither byte-level nor has byte fallback"
            raise UnsupportedFieldError(
                f"structured output is not available with this model: its tokenizer {reason}", param="response_format"
            )
        return llguidance.LLTokenizer(self._library.to_str(), eos_token=eos)

    def stream(self) -> _Stream:
        """A new incremental decoder of this kind of tokenizer; it shows special tokens."""
        if self._kind == "byte_level":
            return _ByteStream(self._bytes)
        if self._kind == "generic":
            return _WindowStream(self, self._byte_values)
        return _PieceStream(self._tokens, self._byte_values, self._strip, drop_first=self._kind == "metaspace")

    def _byte_table(self) -> list[bytes]:
        if self._kind == "byte_level":
            return [_byte_level_bytes(token) for token in self._tokens]
        if self._kind == "generic":
            return self._generic_byte_table()
        table = [b"" if token is None else token.replace(SPACE, " ").encode() for token in self._tokens]
        for token_id, value in self._byte_values.items():
            table[token_id] = bytes([value])
        return table

    def _generic_byte_table(self) -> list[bytes]:
        """Each token's share of a text that it does not begin, by the library's own decoder."""
        anchor = next((i for i, token in enumerate(self._tokens) if token and token.isalnum()), 0)
        prefix = self.decode([anchor], skip_special_tokens=False)
        table = []
        for token_id in range(self.vocab_size):
            if token_id in self._byte_values:
                table.append(bytes([self._byte_values[token_id]]))
                continue
            text = self.decode([anchor, token_id], skip_special_tokens=False)
            alone = not text.startswith(prefix)
            table.append(
                (self.decode([token_id], skip_special_tokens=False) if alone else text[len(prefix) :]).encode()
            )
        return table


class Detokenizer:
    """Text of a growing token sequence: what all `push` and the last `flush` return, joined, is the full decode.

    Bytes that do not yet make a whole character are held. With byte-fallback tokens the whole run of them is held until
    another token ends it, because one invalid byte turns all of its run into U+FFFD. `shown_ids` are special tokens
    that are not skipped with the others.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, shown_ids: Iterable[int] = ()) -> None:
        self._hidden = tokenizer.special_ids - set(shown_ids) if skip_special_tokens else frozenset[int]()
        self._vocab_size = tokenizer.vocab_size
        self._stream = tokenizer.stream()

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that is certain now."""
        if token_id in self._hidden or not 0 <= token_id < self._vocab_size:
            return ""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """The held rest, as the end of a text: incomplete characters become U+FFFD."""
        return self._stream.flush()


class _Stream(Protocol):
    """An incremental decoder; every pushed id is in the vocabulary."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteStream:
    """Byte-level BPE: one UTF-8 byte stream over all tokens."""

    __slots__ = ("_bytes", "_pending")

    def __init__(self, table: list[bytes]) -> None:
        self._bytes = table
        self._pending = b""

    def push(self, token_id: int) -> str:
        data = self._pending + self._bytes[token_id]
        text, consumed = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[consumed:]
        return text

    def flush(self) -> str:
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


class _PieceStream:
    """SentencePiece: each token a piece of text, `<0xNN>` tokens the bytes of a run.

    A run that is not valid UTF-8 becomes one U+FFFD a byte (`tokenizers`' ByteFallback). The leading space goes in one
    of two ways: `strip` drops one space in front of the text (the Strip decoder), `drop_first` drops every U+2581 of
    the first token (the Metaspace decoder).
    """

    __slots__ = ("_byte_values", "_drop_first", "_run", "_strip", "_tokens")

    def __init__(self, tokens: list[str | None], byte_values: dict[int, int], strip: bool, *, drop_first: bool) -> None:
        self._tokens = tokens
        self._byte_values = byte_values
        self._drop_first = drop_first and strip
        self._strip = strip and not drop_first
        self._run = b""

    def push(self, token_id: int) -> str:
        token = self._tokens[token_id]
        if token is None:
            return ""
        value = self._byte_values.get(token_id)
        if value is not None:
            self._run += bytes((value,))
            return ""
        if self._drop_first:
            self._drop_first = False
            return token.replace(SPACE, "")
        text = token.replace(SPACE, " ")
        if self._run:
            text = self._end_run() + text
        return self._lead(text) if self._strip else text

    def flush(self) -> str:
        text = self._end_run()
        return self._lead(text) if self._strip else text

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _lead(self, text: str) -> str:
        if text:
            self._strip = False
        return text.removeprefix(" ")


class _WindowStream:
    """Any decoder: what a token adds to the decoded text of the tokens just before it."""

    __slots__ = ("_byte_values", "_context", "_held", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, byte_values: dict[int, int]) -> None:
        self._tokenizer = tokenizer
        self._byte_values = byte_values
        self._context: tuple[int, ...] = ()  # already shown
        self._held: tuple[int, ...] = ()

    def push(self, token_id: int) -> str:
        self._held = (*self._held, token_id)
        if token_id in self._byte_values:
            return ""
        text = self._added()
        return "" if text is None or text.endswith(REPLACEMENT) else self._show(text)

    def flush(self) -> str:
        return self._show(self._added() or "")

    def _added(self) -> str | None:
        """What the held tokens add; None where they change text that was already shown."""
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after = self._tokenizer.decode(self._context + self._held, skip_special_tokens=False)
        return after[len(before) :] if after.startswith(before) else None

    def _show(self, text: str) -> str:
        self._context = (self._context + self._held)[-WINDOW:]
        self._held = ()
        return text


def _decoder_kind(decoder: dict[str, Any] | None) -> tuple[Kind, bool]:
    """The kind of a `decoder` entry, and whether it takes off the leading space."""
    steps: list[dict[str, Any]] = [decoder] if decoder else []
    if steps and steps[0].get("type") == "Sequence":
        steps = steps[0].get("decoders", [])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    if kinds == ["Metaspace"] and steps[0].get("replacement") == SPACE:
        return "metaspace", steps[0].get("prepend_scheme", "always") != "never"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replace, rest = steps[0], steps[3:]
        if (replace.get("pattern"), replace.get("content")) == ({"String": SPACE}, " "):
            if not rest:
                return "sentencepiece", False
            if rest == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
                return "sentencepiece", True
    return "generic", False


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's printable character of each byte, as {character: byte}: bytes without one are moved up from U+0100."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {0x100 + i: byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()
_ALPHABET_CHARACTERS = frozenset(map(chr, _ALPHABET))


def _byte_level_bytes(token: str | None) -> bytes:
    """The bytes of a byte-level token; one with a character outside the alphabet (an added token) is plain text."""
    if token is None:
        return b""
    if _ALPHABET_CHARACTERS.issuperset(token):
        return token.translate(_ALPHABET).encode("latin-1")
    return token.encode()


def _byte_values(tokens: Iterable[str | None]) -> dict[int, int]:
    """The byte of each `<0xNN>` token, by its id."""
    values = {}
    for token_id, token in enumerate(tokens):
        if token and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                values[token_id] = int(token[3:5], 16)
            except ValueError:
                continue
    return values
