"""One call as both forms write it in JSON: `{"name": "f", "arguments": {…}}`, its arguments given on as they come."""

from __future__ import annotations

import json

from cluster.gateway.deltas import Arguments, Delta, ToolCall
from cluster.gateway.parsing.json_text import WHITE_SPACE, JSONScanner, Place, is_object

ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Reads one call object.

    The call begins once its name is known and its arguments open, so in the usual order nothing of them waits. In
    another order, or with the arguments in a string, it begins at the object's end. `raw` is all that was read.
    """

    def __init__(self, index: int, call_id: str) -> None:
        self.raw = ""
        self.has_begun = False
        self.is_complete = False  # the object has ended, whether it was a call or not
        self._index = index
        self._call_id = call_id
        self._scanner = JSONScanner()
        self._key = ""
        self._start = 0  # in `raw`, of the key or value being read
        self._values: dict[str, str] = {}  # of the object itself: keys and the text of their values
        self._streams = False  # the value being read is the arguments, given on as they come

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        """How many characters belong to the object, and what they mean.

        All of them, unless the object has ended or goes wrong at the next one.
        """
        deltas: list[Delta] = []
        streamed_from = 0 if self._streams else -1  # in `text`
        offset = len(self.raw)
        self.raw += text
        for place, character in enumerate(text):
            before, was_streaming = self._scanner.place, self._streams
            at_top = self._scanner.depth == 1
            if before is Place.VALUE and not self._scanner.depth and character not in "{" + WHITE_SPACE:
                return self._stop(offset + place, place, deltas)
            if before is Place.IN_SCALAR and at_top and character in ",}" + WHITE_SPACE:
                self._end_value(offset + place)
            if not self._scanner.push(character):
                if was_streaming:
                    self._give(deltas, text[streamed_from:place])
                return self._stop(offset + place, place, deltas)
            after = self._scanner.place
            if at_top:
                if after is Place.IN_KEY and before is not Place.IN_KEY:
                    self._start = offset + place
                elif before is Place.IN_KEY and after is Place.COLON:
                    self._key = _string(self.raw[self._start : offset + place + 1]) or ""
                elif before is Place.VALUE and after is not Place.VALUE:
                    self._start = offset + place
                    if character == "{" and self._begins():
                        deltas.append(ToolCall(self._index, self._call_id, _string(self._values["name"]) or ""))
                        self.has_begun = self._streams = True
                        streamed_from = place
                elif before is Place.IN_STRING and after is Place.NEXT:
                    self._end_value(offset + place + 1)
            elif after is Place.NEXT and self._scanner.depth == 1:
                self._end_value(offset + place + 1)
                if self._streams:
                    self._give(deltas, text[streamed_from : place + 1])
                    self._streams = False
            if self._scanner.is_done:
                self.is_complete = True
                self._finish(deltas)
                return self._stop(offset + place + 1, place + 1, deltas)
        if self._streams:
            self._give(deltas, text[streamed_from:])
        return len(text), deltas

    def _stop(self, length: int, consumed: int, deltas: list[Delta]) -> tuple[int, list[Delta]]:
        self.raw = self.raw[:length]
        return consumed, deltas

    def _begins(self) -> bool:
        return not self.has_begun and self._key in ARGUMENTS and bool(_string(self._values.get("name", "")))

    def _end_value(self, end: int) -> None:
        self._values.setdefault(self._key, self.raw[self._start : end])

    def _give(self, deltas: list[Delta], text: str) -> None:
        if text:
            deltas.append(Arguments(self._index, text))

    def _finish(self, deltas: list[Delta]) -> None:
        """At the object's end: a call whose arguments were not given on yet."""
        name = _string(self._values.get("name", ""))
        if self.has_begun or not name:
            return
        found = next((self._values[key] for key in ARGUMENTS if key in self._values), "{}")
        arguments = "{}" if found == "null" else _string(found) or found
        if is_object(arguments):
            self.has_begun = True
            deltas += [ToolCall(self._index, self._call_id, name), Arguments(self._index, arguments.strip(WHITE_SPACE))]


def _string(text: str) -> str | None:
    """What a JSON string stands for; None for any other text."""
    if not text.startswith('"'):
        return None
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
