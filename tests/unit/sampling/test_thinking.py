"""Thoughts before an answer: their end, their budget, and where the grammar begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from cluster.protocol import Grammar, Thinking
from tests.support.grammars import allowed_tokens, compiled
from tests.support.tokenizers_ import build, library
from workers.models.tokenizer import Tokenizer
from workers.sampling.guided import GrammarCompiler
from workers.sampling.thinking import ThinkingMatcher

EOS = (3,)


@pytest.fixture(scope="module", params=["one token", "several"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With the marks as tokens, and without."""
    folder = build("byte_level", tmp_path_factory.mktemp("tokenizer"))
    if request.param == "one token":
        added = library(folder)
        added.add_tokens([AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
        added.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def make(tokenizer: Tokenizer, *, is_open: bool, budget: int | None = None) -> ThinkingMatcher:
    return ThinkingMatcher(
        Thinking(start="<think>", end="</think>", is_open=is_open, budget=budget), None, tokenizer, EOS
    )


def forced(matcher: ThinkingMatcher, tokenizer: Tokenizer) -> list[int]:
    """The tokens that may come next, where these are few."""
    return list(allowed_tokens(matcher, tokenizer.vocab_size).nonzero()[0]) if matcher.is_active else []


def follow(matcher: ThinkingMatcher, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text):
        assert not matcher.is_active
        assert matcher.accept(token_id)


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_end_is_forced_behind_the_budget(tokenizer: Tokenizer, budget: int) -> None:
    end = tokenizer.encode("</think>")
    matcher = make(tokenizer, is_open=True, budget=budget)
    for token_id in tokenizer.encode("one two three four five six seven")[:budget]:
        assert not matcher.is_active
        matcher.accept(token_id)
    for token_id in end:
        assert forced(matcher, tokenizer) == [token_id]
        matcher.accept(token_id)
    follow(matcher, tokenizer, "the answer is as long as it likes, one two three four")
    assert not matcher.is_stopped


def test_thoughts_that_end_by_themselves_are_let_be(tokenizer: Tokenizer) -> None:
    text = "ok</think>"
    matcher = make(tokenizer, is_open=True, budget=len(tokenizer.encode(text)))
    follow(matcher, tokenizer, text + " one two three four five six seven eight nine ten")


def test_a_reply_opens_its_thoughts_itself(tokenizer: Tokenizer) -> None:
    matcher = make(tokenizer, is_open=False, budget=2)
    follow(matcher, tokenizer, "<think>")
    for token_id in tokenizer.encode("one two")[:2]:
        assert not matcher.is_active
        matcher.accept(token_id)
    assert forced(matcher, tokenizer) == tokenizer.encode("</think>")[:1]
    plain = make(tokenizer, is_open=False, budget=0)
    follow(plain, tokenizer, "The answer, with no thought.")


def test_a_new_one_stands_at_the_beginning(tokenizer: Tokenizer) -> None:
    matcher = make(tokenizer, is_open=True, budget=0)
    matcher.accept(forced(matcher, tokenizer)[0])
    assert forced(matcher.restarted(), tokenizer) == tokenizer.encode("</think>")[:1]


def test_the_grammar_begins_behind_the_thoughts(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, EOS)
    try:
        answer = compiled(compiler, Grammar(kind="choice", source=json.dumps(["yes", "no"])))
        for is_open in (True, False):
            thinking = Thinking(start="<think>", end="</think>", is_open=is_open)
            matcher = ThinkingMatcher(thinking, answer.matcher(), tokenizer, EOS)
            first = allowed_tokens(matcher, tokenizer.vocab_size)
            start = tokenizer.encode("<think>")
            if is_open:
                assert first.sum() == tokenizer.vocab_size - len(EOS), "all but the end"
            else:
                assert bool(first[start[0]]) == (len(start) == 1)
                assert first[tokenizer.encode("y")[0]]
                assert not first[tokenizer.encode("x")[0]]
                if len(start) > 1:
                    continue
                assert matcher.accept(start[0])
            for token_id in tokenizer.encode("no, five</think>"):
                assert matcher.is_active
                assert not matcher.is_stopped
                assert matcher.accept(token_id)
            allowed = allowed_tokens(matcher, tokenizer.vocab_size)
            assert not allowed[tokenizer.encode("x")[0]]
            for token_id in tokenizer.encode("yes"):
                assert matcher.accept(token_id)
            assert matcher.is_stopped
            assert not matcher.error
        refused = ThinkingMatcher(
            Thinking(start="<think>", end="</think>", is_open=False), answer.matcher(), tokenizer, EOS
        )
        assert not refused.accept(tokenizer.encode("x")[0])
    finally:
        compiler.close()


def test_a_grammar_may_ask_for_tokens_by_id(tmp_path: Path) -> None:
    """The checker's own vocabulary is smaller than the model's; what comes behind the token is tried all the same."""
    folder = build("byte_level", tmp_path)
    added = library(folder)
    added.add_special_tokens([AddedToken("[CALL]", special=True)])
    added.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    call = tokenizer.vocab_size - 1
    compiler = GrammarCompiler(tokenizer, EOS)
    try:
        matcher = compiled(compiler, Grammar(kind="lark", source=f'start: <[{call}]> "ok"')).matcher()
        assert list(allowed_tokens(matcher, tokenizer.vocab_size).nonzero()[0]) == [call]
        assert all(map(matcher.accept, [call, *tokenizer.encode("ok")]))
        assert matcher.is_stopped
        for wrong in (f"start: <[{call + 1000}]>", 'root ::= "a"'):
            with pytest.raises(Exception, match="cannot be used"):
                compiled(compiler, Grammar(kind="lark", source=wrong))
    finally:
        compiler.close()
