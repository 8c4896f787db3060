"""How few tokens a text can have, told from its length alone.

What certainly exceeds the context is refused before it is tokenised, which takes seconds for some megabytes. A token
stands for at most as many characters as the longest entry of the vocabulary has: in a byte-level vocabulary an entry's
letters are bytes, and no text has more characters than bytes. That holds only where nothing on the way drops text or
folds a run of it into one token, so a tokenizer gets a bound only if all its parts are known not to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

# The longest canonical decomposition of a character, in characters (Unicode Standard Annex #15: U+1F82 and others).
# A composed text decomposes to at least as many characters as its source has, so the source is at most so much longer.
MAX_COMPOSED = 4

_COMPOSING = frozenset({"NFC", "NFKC"})
_KEEPING_NORMALIZERS = frozenset({"NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"})
_KEEPING_SPLITTERS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
_SPLITTING = frozenset({"Split", "Punctuation"})  # these keep all, unless they are told to remove what matches


@dataclass(frozen=True, slots=True)
class LengthBound:
    """The characters that one token stands for at most; None where nothing bounds them."""

    ascii_chars: int | None = None
    other_chars: int | None = None  # of a text that is not all ASCII, which a normalizer may shorten

    def min_tokens(self, text: str) -> int:
        """`text` has at least so many tokens; 0 where its length tells nothing."""
        chars = self.ascii_chars if text.isascii() else self.other_chars
        return 0 if chars is None else -(-len(text) // chars)


def length_bound(tokenizer: Tokenizer) -> LengthBound:
    normalizers = list(_parts(tokenizer.normalizer, "normalizers"))
    splitters = list(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters))
    strips = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    keeps_all = (
        all(map(_normalizer_keeps, normalizers))
        and all(map(_splitter_keeps, splitters))
        and _model_keeps(tokenizer.model, vocab, byte_level)
        and not strips  # such a token takes in all the white space beside it
    )
    if not keeps_all:
        return LengthBound()
    chars = max(map(len, vocab))
    return LengthBound(chars, chars * MAX_COMPOSED ** sum(part["type"] in _COMPOSING for part in normalizers))


def _parts(component: Any, members: str) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as `tokenizer.json` has it, sequences laid flat."""

    def flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if part["type"] != "Sequence":
            yield part
            return
        for child in part[members]:
            yield from flat(child)

    if component is not None:
        yield from flat(json.loads(component.__getstate__()))


def _normalizer_keeps(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        text = part["pattern"].get("String")
        return text is not None and len(part["content"]) >= len(text)
    return part["type"] in _COMPOSING or part["type"] in _KEEPING_NORMALIZERS


def _splitter_keeps(part: dict[str, Any]) -> bool:
    return part["type"] in _KEEPING_SPLITTERS or (part["type"] in _SPLITTING and part["behavior"] != "Removed")


def _model_keeps(model: Any, vocab: dict[str, int], byte_level: bool) -> bool:
    """Whether each character becomes a token or a part of one: others make one token of an unknown word, or none."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if byte_level:
        return vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    if model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return model.unk_token is not None and not model.fuse_unk
