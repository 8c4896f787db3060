"""Calls as Mistral's models write them behind the token `[TOOL_CALLS]`.

The older form is an array, `[TOOL_CALLS] [{"name": "f", "arguments": {…}}, …]`; the newer one names one call at a time,
`[TOOL_CALLS]f[ARGS]{…}`, some with `[CALL_ID]…` before `[ARGS]` (mistral-common's tokenizers v3 to v13).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum

from cluster.gateway.deltas import Arguments, Content, Delta, DeltaParser, ToolCall
from cluster.gateway.openai_tools import FunctionDefinition
from cluster.gateway.parsing.call import CallScanner
from cluster.gateway.parsing.json_text import WHITE_SPACE, JSONScanner
from cluster.gateway.parsing.lark import argument_rules, call_head, literal
from cluster.gateway.parsing.markup import NewCallId, before_mark, mistral_call_id

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

# what may stand between the mark and the arguments of the newer form
_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,256})(?:\[CALL_ID\][A-Za-z0-9_-]{0,64})?(?:\[ARGS\])?\s*(?=\{)")
_NAME = re.compile(r"[A-Za-z0-9_.-]{0,256}")
_ID = re.compile(r"[A-Za-z0-9_-]{0,64}")


class _Place(Enum):
    TEXT = "text"
    CALLS = "behind the mark"
    ITEM = "before a call of an array"
    CALL = "in a call of an array"
    NEXT = "behind a call of an array"
    ARGUMENTS = "in the arguments of a named call"


class MistralParser:
    """White space around calls belongs to their markup. What turns out to be no call is content."""

    def __init__(self, new_id: NewCallId = mistral_call_id) -> None:
        self._new_id = new_id
        self._place = _Place.TEXT
        self._pending = ""
        self._lead = ""  # what was read before the call that has not begun: content where it is none
        self._num_calls = 0
        self._is_behind_call = False  # nothing but white space came since
        self._scanner = CallScanner(0, "")
        self._arguments = JSONScanner()

    def feed(self, text: str) -> list[Delta]:
        self._pending += text
        deltas: list[Delta] = []
        steps = {
            _Place.TEXT: self._text,
            _Place.CALLS: self._calls,
            _Place.ITEM: self._item,
            _Place.CALL: self._call,
            _Place.NEXT: self._next,
            _Place.ARGUMENTS: self._named_arguments,
        }
        while steps[self._place](deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._place is _Place.CALL and not self._scanner.has_begun:
            self._content(deltas, self._lead + self._scanner.raw)
        elif self._place in (_Place.TEXT, _Place.CALLS, _Place.ITEM):
            self._content(deltas, self._lead + self._pending)
        self._pending = self._lead = ""
        return deltas

    def _text(self, deltas: list[Delta]) -> bool:
        """Go on in text; True where there is more to read in another place."""
        cut, at = before_mark(self._pending, CALLS)
        self._content(deltas, self._pending[:cut])
        if at < 0:
            self._pending = self._pending[cut:]
            return False
        self._lead, self._pending = self._pending[cut : at + len(CALLS)], self._pending[at + len(CALLS) :]
        self._place = _Place.CALLS
        return True

    def _calls(self, deltas: list[Delta]) -> bool:
        rest = self._pending.lstrip(WHITE_SPACE)
        if not rest:
            return False
        if rest[0] == "[":
            if rest.startswith(CALLS):
                return self._give_up(deltas)
            return not CALLS.startswith(rest) and self._move_on(self._pending.index("[") + 1, _Place.ITEM)
        named = _NAMED.match(rest)
        if named is not None:
            self._pending = rest[named.end() :]
            deltas.append(ToolCall(self._num_calls, self._new_id(), named[1]))
            self._lead, self._arguments, self._place = "", JSONScanner(), _Place.ARGUMENTS
            self._num_calls += 1
            return True
        return False if _could_be_named(rest) else self._give_up(deltas)

    def _item(self, deltas: list[Delta]) -> bool:
        rest = self._pending.lstrip(WHITE_SPACE)
        if not rest:
            return False
        if rest[0] == "]" and self._is_behind_call:
            return self._move_on(self._pending.index("]") + 1, _Place.TEXT, is_read=True)
        if rest[0] != "{":
            return self._give_up(deltas)
        self._place, self._scanner = _Place.CALL, CallScanner(self._num_calls, self._new_id())
        return True

    def _call(self, deltas: list[Delta]) -> bool:
        num_read, found = self._scanner.feed(self._pending)
        deltas += found
        self._pending = self._pending[num_read:]
        if not self._pending and not self._scanner.is_complete:
            return False
        if not self._scanner.has_begun:
            self._lead += self._scanner.raw
            return self._give_up(deltas)
        self._lead, self._is_behind_call = "", True
        self._num_calls += 1
        self._place = _Place.NEXT
        return True

    def _next(self, deltas: list[Delta]) -> bool:
        rest = self._pending.lstrip(WHITE_SPACE)
        if not rest:
            return False
        if rest[0] in ",]":
            following = _Place.ITEM if rest[0] == "," else _Place.TEXT
            return self._move_on(self._pending.index(rest[0]) + 1, following, is_read=following is _Place.TEXT)
        return self._give_up(deltas)

    def _named_arguments(self, deltas: list[Delta]) -> bool:
        end = 0
        while end < len(self._pending) and not self._arguments.is_done and self._arguments.push(self._pending[end]):
            end += 1
        if end:
            deltas.append(Arguments(self._num_calls - 1, self._pending[:end]))
        self._pending = self._pending[end:]
        if not self._pending and not self._arguments.is_done:
            return False
        self._is_behind_call = True
        self._place = _Place.TEXT
        return True

    def _move_on(self, length: int, place: _Place, *, is_read: bool = False) -> bool:
        """Behind some markup, which is lost for good where `is_read`."""
        self._lead = "" if is_read else self._lead + self._pending[:length]
        self._pending = self._pending[length:]
        self._place = place
        return True

    def _give_up(self, deltas: list[Delta]) -> bool:
        """It is no call: what was read of it is content, and the rest is looked at as text."""
        self._content(deltas, self._lead)
        self._lead = ""
        self._place = _Place.TEXT
        return True

    def _content(self, deltas: list[Delta], text: str) -> None:
        if self._is_behind_call:
            text = text.lstrip(WHITE_SPACE)
        if text:
            self._is_behind_call = False
            deltas.append(Content(text))


def _could_be_named(text: str) -> bool:
    """Whether `text`, which begins no call yet, could go on to be a name, its marks and arguments."""
    name = _NAME.match(text)
    assert name is not None
    rest = text[name.end() :]
    if not rest:
        return True
    if not name[0]:
        return False
    if rest.startswith(CALL_ID):
        call_id = _ID.match(rest, len(CALL_ID))
        assert call_id is not None
        rest = rest[call_id.end() :]
    elif CALL_ID.startswith(rest):
        return True
    rest = rest.removeprefix(ARGS)
    return ARGS.startswith(rest) or not rest.strip(WHITE_SPACE)


class MistralFormat:
    """What a gateway needs of this form: a parser, the marks in it, and the grammar of calls.

    `is_named`: the checkpoint's template writes the newer form.
    """

    marks = (CALLS, ARGS, CALL_ID)

    def __init__(self, *, is_named: bool) -> None:
        self._is_named = is_named

    def parser(self) -> DeltaParser:
        return MistralParser()

    def rules(self, functions: Sequence[FunctionDefinition], tokens: Mapping[str, int], *, many: bool) -> list[str]:
        """Rules of which `calls` is one call of one of `functions`, or more of them where `many`."""
        if self._is_named:
            bodies = [
                f"{literal(CALLS + function.name + ARGS, tokens)} arguments_{place}"
                for place, function in enumerate(functions)
            ]
            head = [f"calls: call{' call*' if many else ''}"]
        else:
            bodies = [
                f"{literal(call_head(function), tokens)} arguments_{place} {literal('}', tokens)}"
                for place, function in enumerate(functions)
            ]
            again = f" ( {literal(', ', tokens)} call )*" if many else ""
            head = [f"calls: {literal(CALLS, tokens)} / ?/ {literal('[', tokens)} call{again} {literal(']', tokens)}"]
        return [*head, f"call: {' | '.join(bodies)}", *argument_rules(functions)]
