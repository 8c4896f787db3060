from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.protocol import Finish, Stopping
from tests.support.tokenizers_ import build, library
from workers.models.tokenizer import Detokenizer, Tokenizer
from workers.sampling.stop import StopChecker

EOS = (2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("byte_level", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> tokenizers.Tokenizer:
    return library(folder)


def checker(tokenizer: Tokenizer, **fields: object) -> StopChecker:
    stopping = Stopping(**{"max_tokens": 1000, **fields})  # type: ignore[arg-type]
    return StopChecker(Detokenizer(tokenizer, stopping.skip_special_tokens), stopping, EOS)


def characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


def run(stop: StopChecker, ids: list[int]) -> tuple[str, Finish | None, int]:
    """The whole text, the end and the number of tokens taken, pushed one at a time."""
    text = ""
    for i, token_id in enumerate(ids):
        released, finish = stop.push([token_id])
        text += released
        if finish is not None:
            return text, finish, i + 1
    return text, None, len(ids)


def test_text_is_released_at_once_where_nothing_can_match(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("END",))
    released = [stop.push([token])[0] for token in characters(tokenizer, "abcde")]
    assert released == ["a", "b", "c", "d", "e"]


def test_a_possible_beginning_is_held_back_until_it_cannot_match(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("END",))
    released = [stop.push([token])[0] for token in characters(tokenizer, "xENxEEND")]
    assert released == ["x", "", "", "ENx", "", "E", "", ""]


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        (("END",), "one END two", "one ", "END"),
        (("\n\n",), "a\nb\n\nc", "a\nb", "\n\n"),
        (("aab",), "aaab", "a", "aab"),
        (("abab", "bx"), "ababab", "", "abab"),
        (("bc", "abcd"), "xabcd", "xa", "bc"),  # complete first
        (("bc", "abc"), "xabc", "x", "abc"),  # complete at once: the longest
        (("é🙂",), "café🙂!", "caf", "é🙂"),
        (("the end", "zzz"), "the ende", "", "the end"),
    ],
)
def test_a_stop_string_is_cut_off(
    tokenizer: Tokenizer,
    encoder: tokenizers.Tokenizer,
    stops: tuple[str, ...],
    text: str,
    shown: str,
    matched: str,
) -> None:
    for ids in (characters(tokenizer, text), encoder.encode(text).ids):
        found, finish, _ = run(checker(tokenizer, stop=stops), ids)
        assert found == shown
        assert finish == Finish(reason="stop", stop_reason=matched)
        kept, _, _ = run(checker(tokenizer, stop=stops, include_stop=True), ids)
        assert kept == shown + matched


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\né", max_size=30),
    stops=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=5), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_the_result_is_that_of_one_character_at_a_time(
    tokenizer: Tokenizer, text: str, stops: list[str], seed: int
) -> None:
    # the first end of any match decides; among those, the earliest start
    ends = [
        (text.find(s, start) + len(s), text.find(s, start))
        for s in stops
        for start in range(len(text) + 1)
        if text.find(s, start) >= 0
    ]
    shown = text[: min(ends)[1]] if ends else text
    stop = checker(tokenizer, stop=tuple(stops))
    ids = characters(tokenizer, text)
    generator = random.Random(seed)
    found, finish = "", None
    while ids and finish is None:  # several tokens at once, as speculation gives them
        count = generator.randrange(1, 4)
        released, finish = stop.push(ids[:count])
        found += released
        assert shown.startswith(found)  # nothing is shown that has to be taken back
        ids = ids[count:]
    assert (finish is not None) == bool(ends)
    assert found + ("" if finish else stop.flush()) == shown


def test_tokens_behind_the_end_are_not_taken(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("b",))
    text, finish = stop.push(characters(tokenizer, "abc"))
    assert (text, finish, stop.num_tokens) == ("a", Finish(reason="stop", stop_reason="b"), 2)


def test_eos_ends_without_its_text_and_flushes_what_was_held(tokenizer: Tokenizer) -> None:
    for skip in (True, False):
        stop = checker(tokenizer, stop=("xyz",), skip_special_tokens=skip)
        text, finish, taken = run(stop, [*characters(tokenizer, "axy"), 3, 5])
        assert (text, finish, taken) == ("axy", Finish(reason="stop"), 4)


def test_eos_is_an_ordinary_token_where_it_is_ignored(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, ignore_eos=True, skip_special_tokens=False, max_tokens=3)
    text, finish, _ = run(stop, [*characters(tokenizer, "a"), 3, *characters(tokenizer, "b")])
    assert (text, finish) == ("a<|im_end|>b", Finish(reason="length"))


def test_a_stop_token_ends_and_names_its_id(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "abc")
    text, finish, taken = run(checker(tokenizer, stop_token_ids=(ids[1],)), ids)
    assert (text, finish, taken) == ("a", Finish(reason="stop", stop_reason=ids[1]), 2)
    text, _, _ = run(checker(tokenizer, stop_token_ids=(ids[1],), include_stop=True), ids)
    assert text == "ab"


def test_max_tokens_ends_with_the_whole_text(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("bcd",), max_tokens=3)
    assert run(stop, characters(tokenizer, "abcd")) == ("abc", Finish(reason="length"), 3)
    # an incomplete character is shown as far as it can be
    assert run(checker(tokenizer, max_tokens=2), characters(tokenizer, "aé")) == ("a\ufffd", Finish(reason="length"), 2)


def test_a_stop_at_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "ab")
    assert run(checker(tokenizer, stop=("b",), max_tokens=2), ids)[1] == Finish(reason="stop", stop_reason="b")
    assert run(checker(tokenizer, max_tokens=1), [2])[1] == Finish(reason="stop")


def test_nothing_but_max_tokens_ends_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "ab")
    text, finish, taken = run(checker(tokenizer, stop=("b",), min_tokens=5), [*ids, 3, *ids])
    assert (text, finish, taken) == ("aba", Finish(reason="stop", stop_reason="b"), 5)
    text, finish, taken = run(checker(tokenizer, min_tokens=3, stop_token_ids=(ids[0],)), [ids[0], 3, ids[1], ids[0]])
    assert (text, taken) == ("ab", 4)
    # a match that is too early is not held against the text; one that overlaps it counts
    text, finish, _ = run(checker(tokenizer, stop=("aba",), min_tokens=4), characters(tokenizer, "ababa"))
    assert (text, finish) == ("ab", Finish(reason="stop", stop_reason="aba"))


def test_a_long_stop_string_costs_no_more_than_a_short_one(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("a" * 50_000 + "b",))
    found, finish, _ = run(stop, characters(tokenizer, "a" * 300 + "c"))
    assert (found, finish) == ("a" * 300 + "c", None)


def test_restore_tells_nothing_again_and_goes_on_in_the_middle_of_a_match(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "oné END")
    for cut in range(len(ids) + 1):
        whole = checker(tokenizer, stop=("END",))
        before = "".join(whole.push([token])[0] for token in ids[:cut])
        resumed = checker(tokenizer, stop=("END",))
        finish = resumed.restore(ids[:cut])
        rest = "" if finish else run(resumed, ids[cut:])[0]
        assert before + rest == "oné "
        assert (finish is not None) == (cut >= 8)  # é is two of the bytes


def test_flush_shows_the_held_text(tokenizer: Tokenizer) -> None:
    stop = checker(tokenizer, stop=("END",))
    assert stop.push(characters(tokenizer, "xEN"))[0] == "x"
    assert stop.flush() == "EN"
    assert stop.flush() == ""


def test_with_sentencepiece_the_leading_space_is_no_text(tmp_path: Path) -> None:
    folder = build("sentencepiece", tmp_path)
    ids = library(folder).encode("one two three").ids
    assert run(checker(Tokenizer(folder), stop=(" three",)), ids)[0] == "one two"
