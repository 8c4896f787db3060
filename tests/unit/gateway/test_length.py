"""What a text's length says of its tokens: never too much, for any tokenizer."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from cluster.gateway.length import LengthBound, length_bound
from tests.support.scripted_worker import byte_tokenizer
from tests.support.tokenizers_ import KINDS, build, library

BOUNDED = ("byte_level", "sentencepiece", "sentencepiece_keep_space", "metaspace", "no_decoder")
SHORTENED = [
    "e\u0301" * 40,
    "\u03b1\u0313\u0300\u0345" * 40,  # four characters that compose to one
    "\u1112\u1161\u11ab" * 40,
    "ﬃ" * 40,
    " " * 200,
    "\x00" * 99,
    "🙂" * 50,
    "<s>" * 50,
]


@functools.cache
def tokenizer(kind: str, normalizer: str = "") -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        found = library(build(kind, Path(folder)))
    if normalizer:
        found.normalizer = getattr(normalizers, normalizer)()
    return found


@pytest.mark.parametrize("normalizer", ["", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt"])
@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("a <s>\u0301\u0345\u200b"), max_size=80))
@example(text="")
def test_the_bound_is_never_over_the_count(kind: str, normalizer: str, text: str) -> None:
    found = tokenizer(kind, normalizer)
    bound = length_bound(found)
    for piece in (text, *SHORTENED):
        assert bound.min_tokens(piece) <= len(found.encode(piece, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_common_tokenizer_has_a_bound(kind: str) -> None:
    longest = max(map(len, tokenizer(kind).get_vocab()))
    assert length_bound(tokenizer(kind)) == LengthBound(longest, longest)
    assert length_bound(tokenizer(kind)).min_tokens("x" * (10 * longest + 1)) == 11


def test_composing_counts_for_what_is_not_ascii() -> None:
    found = byte_tokenizer()
    found.normalizer = normalizers.NFC()
    assert length_bound(found) == LengthBound(13, 52)  # <|endoftext|>


def test_what_may_drop_text_has_no_bound() -> None:
    changed = [byte_tokenizer() for _ in range(5)]
    changed[0].normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(" +"), " ")])
    changed[1].normalizer = normalizers.Replace("  ", " ")
    changed[2].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    changed[3].add_special_tokens([AddedToken("<mask>", lstrip=True)])
    changed[4].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for found in (*changed, tokenizer("wordpiece")):
        assert length_bound(found) == LengthBound()
        assert length_bound(found).min_tokens("x" * 10**6) == 0
