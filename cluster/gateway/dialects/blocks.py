"""A chat's reply as a list of blocks, for the APIs that answer in such: thoughts, text, and each call of a tool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.gateway.deltas import Content, Delta, DeltaParser, Reasoning, ToolCall
from cluster.gateway.parsing.json_text import is_object

BlockKind = Literal["thoughts", "text", "call"]


@dataclass(slots=True, eq=False)
class Block:
    """What follows each other of one kind; a call's pieces are its arguments."""

    kind: BlockKind
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def is_whole_call(self) -> bool:
        """A call that can be made: one that was not cut off."""
        return self.kind == "call" and is_object(self.text or "{}")


class Blocks:
    """The blocks of one reply so far."""

    def __init__(self) -> None:
        self.all: list[Block] = []

    def add(self, delta: Delta) -> tuple[Block, str]:
        """The block that `delta` belongs to, a new one where it begins one, and what it adds."""
        if isinstance(delta, ToolCall):
            self.all.append(Block("call", delta.call_id, delta.name))
            return self.all[-1], ""
        kind: BlockKind = (
            "thoughts" if isinstance(delta, Reasoning) else "text" if isinstance(delta, Content) else "call"
        )
        if kind != "call" and (not self.all or self.all[-1].kind != kind):
            self.all.append(Block(kind))
        block = self.all[-1]
        assert block.kind == kind, "a call's arguments follow its beginning"
        block.pieces.append(delta.text)
        return block, delta.text


def read_blocks(parser: DeltaParser, text: str) -> list[Block]:
    """A whole reply's text, taken apart."""
    blocks = Blocks()
    for delta in (*parser.feed(text), *parser.finish()):
        blocks.add(delta)
    return blocks.all


class ThoughtTokens:
    """Counts the tokens of a reply's thoughts: up to the one that ends them, which is a token of its own.

    `end_id` None: it is not, and the number cannot be known unless all is thought.
    """

    def __init__(self, end_id: int | None) -> None:
        self._end_id = end_id
        self._num = 0
        self._have_ended = False

    def add(self, token_ids: Sequence[int]) -> None:
        if self._have_ended:
            return
        self._have_ended = self._end_id is not None and self._end_id in token_ids
        self._num += token_ids.index(self._end_id) + 1 if self._have_ended else len(token_ids)  # type: ignore[arg-type]

    def total(self, blocks: Iterable[Block]) -> int:
        """Of a reply that is `blocks`; 0 where it cannot be known."""
        kinds = {block.kind for block in blocks}
        return self._num if kinds == {"thoughts"} or ("thoughts" in kinds and self._have_ended) else 0
