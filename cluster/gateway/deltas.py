"""What a chat's reply is made of, in the order in which the model writes it: thoughts, text and calls of tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A next piece of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins; its arguments follow. `index` counts the calls of one choice from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A next piece of a call's arguments; all of them joined are one JSON object's text."""

    index: int
    text: str


Delta = Reasoning | Content | ToolCall | Arguments


class DeltaParser(Protocol):
    """Takes one choice's text as it comes. What could still become markup is held back; nothing else is."""

    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, once no text follows."""
        ...


class PlainText:
    """All of it is content."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


MakeParser = Callable[[], DeltaParser]


@dataclass(slots=True)
class FullToolCall:
    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """The deltas of one choice, gathered."""

    reasoning: str = ""
    content: str = ""
    calls: list[FullToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        if isinstance(delta, Content):
            self.content += delta.text
        elif isinstance(delta, Reasoning):
            self.reasoning += delta.text
        elif isinstance(delta, ToolCall):
            self.calls.append(FullToolCall(delta.call_id, delta.name))
        else:
            self.calls[delta.index].arguments += delta.text


def gather(parser: DeltaParser, text: str) -> Reply:
    """A whole reply's text, taken apart."""
    reply = Reply()
    for delta in (*parser.feed(text), *parser.finish()):
        reply.add(delta)
    return reply
