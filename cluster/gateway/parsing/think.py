"""Thoughts between `<think>` and `</think>` before the answer, as DeepSeek-R1, Qwen3 and many others write them."""

from __future__ import annotations

from enum import Enum

from cluster.gateway.deltas import Delta, DeltaParser, Reasoning
from cluster.gateway.parsing.json_text import WHITE_SPACE
from cluster.gateway.parsing.markup import before_mark

OPEN, CLOSE = "<think>", "</think>"


class _Place(Enum):
    BEFORE = "before"
    THOUGHTS = "thoughts"
    BEHIND = "behind the end, white space at most"
    ANSWER = "answer"


class ThinkParser:
    """Splits a reply's thoughts off; its answer goes on to `answer`.

    `is_open`: the prompt has opened the thoughts. White space around the marks belongs to them. Without an end all of
    it is thought; without a beginning nothing is.
    """

    def __init__(self, answer: DeltaParser, *, is_open: bool) -> None:
        self._answer = answer
        self._place = _Place.THOUGHTS if is_open else _Place.BEFORE
        self._pending = ""
        self._has_thought = False

    def feed(self, text: str) -> list[Delta]:
        if self._place is _Place.ANSWER:
            return self._answer.feed(text)
        self._pending += text
        deltas: list[Delta] = []
        if self._place is _Place.BEFORE:
            self._before()
        if self._place is _Place.THOUGHTS:
            self._thoughts(deltas)
        if self._place is _Place.BEHIND:
            self._pending = self._pending.lstrip(WHITE_SPACE)
            if self._pending:
                self._place = _Place.ANSWER
        if self._place is _Place.ANSWER:
            rest, self._pending = self._pending, ""
            deltas += self._answer.feed(rest)
        return deltas

    def finish(self) -> list[Delta]:
        rest, self._pending = self._pending, ""
        if self._place is _Place.THOUGHTS:
            deltas: list[Delta] = []
            self._think(deltas, rest.rstrip(WHITE_SPACE))
            return deltas
        return [*(self._answer.feed(rest) if rest else []), *self._answer.finish()]

    def _before(self) -> None:
        begun = self._pending.lstrip(WHITE_SPACE)
        if begun.startswith(OPEN):
            self._pending, self._place = begun[len(OPEN) :], _Place.THOUGHTS
        elif not OPEN.startswith(begun):
            self._place = _Place.ANSWER

    def _thoughts(self, deltas: list[Delta]) -> None:
        cut, at = before_mark(self._pending, CLOSE)
        self._think(deltas, self._pending[:cut])
        if at < 0:
            self._pending = self._pending[cut:]
        else:
            self._pending, self._place = self._pending[at + len(CLOSE) :], _Place.BEHIND

    def _think(self, deltas: list[Delta], text: str) -> None:
        if not self._has_thought:
            text = text.lstrip(WHITE_SPACE)
        if text:
            self._has_thought = True
            deltas.append(Reasoning(text))
