"""Calls as Hermes and Qwen write them: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from cluster.gateway.deltas import Content, Delta, DeltaParser
from cluster.gateway.openai_tools import FunctionDefinition
from cluster.gateway.parsing.call import CallScanner
from cluster.gateway.parsing.json_text import WHITE_SPACE
from cluster.gateway.parsing.lark import argument_rules, call_head, literal
from cluster.gateway.parsing.markup import NewCallId, before_mark, openai_call_id

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class _Place(Enum):
    TEXT = "text"
    CALL = "call"
    CLOSING = "closing"  # behind a call's object


class HermesParser:
    """White space before and behind a call belongs to its markup. What turns out to be no call is content."""

    def __init__(self, new_id: NewCallId = openai_call_id) -> None:
        self._new_id = new_id
        self._place = _Place.TEXT
        self._pending = ""
        self._lead = ""  # the white space before the call being read
        self._num_calls = 0
        self._is_behind_call = False  # nothing but white space came since
        self._scanner = CallScanner(0, "")

    def feed(self, text: str) -> list[Delta]:
        self._pending += text
        deltas: list[Delta] = []
        steps = {_Place.TEXT: self._text, _Place.CALL: self._call, _Place.CLOSING: self._closing}
        while steps[self._place](deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._place is _Place.CALL and not self._scanner.has_begun:
            self._content(deltas, self._lead + OPEN + self._scanner.raw)
        elif self._place is _Place.TEXT:
            self._content(deltas, self._pending)
        self._pending = ""
        return deltas

    def _text(self, deltas: list[Delta]) -> bool:
        """Go on in text; True where there is more to read in another place."""
        cut, at = before_mark(self._pending, OPEN)
        self._content(deltas, self._pending[:cut])
        if at < 0:
            self._pending = self._pending[cut:]
            return False
        self._lead, self._pending = self._pending[cut:at], self._pending[at + len(OPEN) :]
        self._place, self._scanner = _Place.CALL, CallScanner(self._num_calls, self._new_id())
        return True

    def _call(self, deltas: list[Delta]) -> bool:
        num_read, found = self._scanner.feed(self._pending)
        deltas += found
        self._pending = self._pending[num_read:]
        if not self._pending and not self._scanner.is_complete:
            return False
        if self._scanner.has_begun:
            self._num_calls += 1
            self._place = _Place.CLOSING
        else:  # no call
            self._content(deltas, self._lead + OPEN + self._scanner.raw)
            self._place = _Place.TEXT
        return True

    def _closing(self, deltas: list[Delta]) -> bool:
        rest = self._pending.lstrip(WHITE_SPACE)
        if rest.startswith(CLOSE):
            self._pending = rest[len(CLOSE) :]
        elif CLOSE.startswith(rest):
            return False
        self._is_behind_call = True
        self._place = _Place.TEXT
        return True

    def _content(self, deltas: list[Delta], text: str) -> None:
        if self._is_behind_call:
            text = text.lstrip(WHITE_SPACE)
        if text:
            self._is_behind_call = False
            deltas.append(Content(text))


class HermesFormat:
    """What a gateway needs of this form: a parser, the marks in it, and the grammar of calls."""

    marks = (OPEN, CLOSE)

    def parser(self) -> DeltaParser:
        return HermesParser()

    def rules(self, functions: Sequence[FunctionDefinition], tokens: Mapping[str, int], *, many: bool) -> list[str]:
        """Rules of which `calls` is one call of one of `functions`, or more of them where `many`."""
        again = f" ( {literal(chr(10), tokens)} call )*" if many else ""
        bodies = [
            f"{literal(call_head(function), tokens)} arguments_{place} {literal('}', tokens)}"
            for place, function in enumerate(functions)
        ]
        opening, closing = literal(OPEN + "\n", tokens), literal("\n" + CLOSE, tokens)
        return [
            f"calls: call{again}",
            f"call: {opening} ( {' | '.join(bodies)} ) {closing}",
            *argument_rules(functions),
        ]
