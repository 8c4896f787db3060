"""JSON as it is written, character by character: where a value ends, and where it has gone wrong.

Structure is followed exactly, numbers and words are taken as they come. There is no recursion: a model may nest as deep
as it likes.
"""

from __future__ import annotations

from enum import Enum

WHITE_SPACE = " \t\n\r"
_SCALAR = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Place(Enum):
    VALUE = "a value"
    FIRST_ITEM = "a value or the end of an array"
    FIRST_KEY = "a key or the end of an object"
    KEY = "a key"
    COLON = "a colon"
    NEXT = "a comma or a closing bracket"
    IN_KEY = "inside a key"
    IN_STRING = "inside a string"
    IN_SCALAR = "inside a number or a word"
    DONE = "behind the value"


class JSONScanner:
    """Follows one JSON value; a number or word at the top has no end of its own, so it is never done."""

    def __init__(self) -> None:
        self.place = Place.VALUE
        self._open: list[str] = []
        self._escaped = False

    @property
    def depth(self) -> int:
        return len(self._open)

    @property
    def is_done(self) -> bool:
        return self.place is Place.DONE

    def push(self, character: str) -> bool:
        """Go on by one character; False, and nothing changes, where no JSON goes on with it."""
        place = self.place
        if place in (Place.IN_STRING, Place.IN_KEY):
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.place = Place.COLON if place is Place.IN_KEY else self._behind_value()
            return True
        if place is Place.IN_SCALAR:
            if character in _SCALAR:
                return True
            place = self._behind_value()
        if character in WHITE_SPACE:
            if place is not Place.DONE:
                self.place = place
                return True
            return False
        following = self._following(place, character)
        if following is None:
            return False
        self.place = following
        return True

    def _following(self, place: Place, character: str) -> Place | None:
        if place in (Place.VALUE, Place.FIRST_ITEM):
            if character in "{[":
                self._open.append(character)
                return Place.FIRST_KEY if character == "{" else Place.FIRST_ITEM
            if character == '"':
                return Place.IN_STRING
            if character == "]" and place is Place.FIRST_ITEM:
                return self._close()
            return Place.IN_SCALAR if character in _SCALAR else None
        if place in (Place.FIRST_KEY, Place.KEY):
            if character == '"':
                return Place.IN_KEY
            return self._close() if character == "}" and place is Place.FIRST_KEY else None
        if place is Place.COLON:
            return Place.VALUE if character == ":" else None
        if place is Place.NEXT:
            if character == ",":
                return Place.KEY if self._open[-1] == "{" else Place.VALUE
            return self._close() if character == {"{": "}", "[": "]"}[self._open[-1]] else None
        return None

    def _close(self) -> Place:
        self._open.pop()
        return self._behind_value()

    def _behind_value(self) -> Place:
        return Place.NEXT if self._open else Place.DONE


def is_object(text: str) -> bool:
    """Whether a text is one JSON object, with white space around it at most."""
    text = text.strip(WHITE_SPACE)
    scanner = JSONScanner()
    return text.startswith("{") and all(map(scanner.push, text)) and scanner.is_done
