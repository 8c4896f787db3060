from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, UnsupportedFieldError
from tests.support.tokenizers_ import KINDS, TEXT, build, library
from workers.models.tokenizer import Detokenizer, Tokenizer

FOLDERS: dict[str, Path] = {}
LOADED: dict[str, Tokenizer] = {}
LIBRARY: dict[str, tokenizers.Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in KINDS:
        FOLDERS[kind] = build(kind, tmp_path_factory.mktemp(kind))
        LOADED[kind] = Tokenizer(FOLDERS[kind])
        LIBRARY[kind] = library(FOLDERS[kind])


def encode(kind: str, text: str) -> list[int]:
    ids: list[int] = LIBRARY[kind].encode(text).ids
    return ids


def streamed(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_stream_is_the_full_decode(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = LOADED[kind]
    anything = st.integers(-2, tokenizer.vocab_size + 2)
    special_or_bytes = st.integers(0, 262)  # SentencePiece's bytes: most runs of them are no valid UTF-8
    encoded = st.text(alphabet="aé日🙂 \n{", max_size=4).map(lambda text: encode(kind, text))
    parts = data.draw(st.lists(st.one_of(anything.map(lambda i: [i]), special_or_bytes.map(lambda i: [i]), encoded)))
    ids = [token_id for part in parts for token_id in part]
    assert streamed(Detokenizer(tokenizer, skip), ids) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_is_the_librarys(kind: str) -> None:
    for text in TEXT[:6]:
        ids = encode(kind, text)
        assert LOADED[kind].decode(ids) == LIBRARY[kind].decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "sentencepiece_keep_space", "metaspace"])
def test_token_bytes_join_to_the_text(kind: str) -> None:
    tokenizer = LOADED[kind]
    for text in TEXT[:3]:  # all of it is in the vocabularies
        joined = b"".join(tokenizer.token_bytes(token_id) for token_id in encode(kind, text))
        assert joined.removeprefix(b" ").decode() == text


def test_bytes_of_split_characters() -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = LOADED[kind]
        ids = encode(kind, "\u0bb5")  # in no training text
        assert len(ids) >= 3
        assert b"".join(tokenizer.token_bytes(i) for i in ids).strip() == "\u0bb5".encode()


def test_wordpieces_bytes_are_what_they_add_to_a_text() -> None:
    tokenizer = LOADED["wordpiece"]
    ids = encode("wordpiece", "quick")
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in [*ids, *ids])
    assert joined == b" quick quick"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_ids_that_are_none(kind: str) -> None:
    tokenizer = LOADED[kind]
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.token_bytes(3).strip() == b"<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([3, -1, 10**6]) == ""


def test_incomplete_characters_wait_for_their_rest() -> None:
    tokenizer = LOADED["byte_level"]
    byte_ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    detokenizer = Detokenizer(tokenizer)
    released = [detokenizer.push(byte_ids[bytes([byte])]) for byte in "é🙂".encode()]
    assert released == ["", "é", "", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_a_file_or_its_folder_may_be_named() -> None:
    folder = FOLDERS["byte_level"]
    assert Tokenizer(folder / "tokenizer.json").vocab_size == Tokenizer(str(folder)).vocab_size


def test_truncation_and_padding_of_the_file_are_not_a_grammars(tmp_path: Path) -> None:
    changed = library(FOLDERS["byte_level"])
    changed.enable_truncation(4)
    changed.enable_padding(length=50)
    changed.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).grammar_tokenizer([2]).tokenize_str(TEXT[0]) == encode("byte_level", TEXT[0])


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe\x00", b'{"a":' * 100_000])
def test_a_corrupt_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_an_absurd_token_id_is_refused_before_memory_is_taken_for_it(tmp_path: Path) -> None:
    state = json.loads((FOLDERS["byte_level"] / "tokenizer.json").read_text())
    state["model"]["vocab"]["huge"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=str(2**31)):
        Tokenizer(tmp_path)


def test_grammars_need_a_tokenizer_of_plain_pieces_and_an_end() -> None:
    for kind in ("wordpiece", "metaspace", "no_decoder"):
        with pytest.raises(UnsupportedFieldError, match="structured output"):
            LOADED[kind].grammar_tokenizer([2])
    with pytest.raises(UnsupportedFieldError, match="end-of-sequence"):
        LOADED["byte_level"].grammar_tokenizer([10**6])
    assert LOADED["sentencepiece"].grammar_tokenizer([2, 10**6]).eos_tokens == [2]
