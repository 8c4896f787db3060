"""The typed events of a streamed response; each has its number, and what it has begun it ends.

``response.created``, ``response.in_progress``, then for each output item ``response.output_item.added`` … ``.done``,
and one terminal: ``response.completed``, ``response.incomplete`` or ``response.failed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from cluster.errors import ForetokenError
from cluster.gateway.dialects.base import Batch, Events
from cluster.gateway.dialects.blocks import Block, Blocks, ThoughtTokens
from cluster.gateway.dialects.response_body import (
    asked_of,
    item_body,
    new_item_id,
    part_body,
    response_body,
    status_of,
    usage_body,
)
from cluster.gateway.logprobs import chat_logprobs
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput

_TEXT_EVENT = {
    "thoughts": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}


# the response at its end, of: the job, its blocks and their items, its usage, and how it ended
End = Callable[[Job, list[Block], list[dict[str, Any]], dict[str, Any], Finish], dict[str, Any]]


class ResponseEvents(Events):
    def __init__(self, job: Job, thoughts_end: int | None, end: End) -> None:
        super().__init__(job)
        self._job = job
        self._end = end
        self._usage = Usage(job)
        self._thoughts = ThoughtTokens(thoughts_end)
        self._parser = job.make_parser()
        self._blocks = Blocks()
        self._items: list[dict[str, Any]] = []  # those that have ended
        self._open: _OpenItem | None = None
        self._finish: Finish | None = None
        asked = asked_of(job)
        self._num_top = (asked.top_logprobs or 0) if asked.wants_logprobs else None
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not written yet
        self._sequence = 0

    def events(self, batch: Batch) -> bytes:
        begun = b"" if self._sequence else self._begin()
        return begun + b"".join([self._of(output) for _, output in batch])

    def closing(self) -> bytes:
        assert self._finish is not None, "a generation ends with its finish"
        written = b"" if self._blocks.all else self._begin_item(Block("text"))
        written += self._end_item(status_of(self._finish))
        blocks = self._blocks.all or [Block("text")]
        usage = usage_body(self._usage, self._thoughts.total(blocks))
        body = self._end(self._job, blocks, self._items, usage, self._finish)
        return written + self._event(f"response.{body['status']}", {"response": body})

    def failing(self, error: ForetokenError) -> bytes:
        if not self._sequence:
            return self._event("error", {"code": error.code, "message": error.message, "param": error.param})
        code = "rate_limit_exceeded" if error.status == 429 else "server_error" if error.status >= 500 else error.code
        failed = {"status": "failed", "output": self._items, "error": {"code": code, "message": error.message}}
        return self._event("response.failed", {"response": response_body(self._job) | failed | {"store": False}})

    def _begin(self) -> bytes:
        body = {"response": response_body(self._job)}
        return self._event("response.created", body) + self._event("response.in_progress", body)

    def _of(self, output: RequestOutput) -> bytes:
        self._usage.add(0, output)
        self._thoughts.add(output.token_ids)
        deltas = self._parser.feed(output.text) if output.text else []
        if output.finish is not None:
            self._finish = output.finish
            deltas += self._parser.finish()
        logprobs = [] if self._num_top is None else chat_logprobs(output.logprobs, self._num_top)["content"]
        self._logprobs += logprobs
        written = b""
        for delta in deltas:
            block, piece = self._blocks.add(delta)
            if self._open is None or block is not self._open.block:
                if self._open is not None:
                    self._logprobs = list(logprobs)  # what came before were marks
                written += self._end_item("completed") + self._begin_item(block)
            if piece:
                written += self._piece(piece)
        return written

    def _event(self, kind: str, members: dict[str, Any]) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"

    def _begin_item(self, block: Block) -> bytes:
        opened = self._open = _OpenItem(block, new_item_id(block), len(self._items))
        begun = Block(block.kind, block.call_id, block.name)  # without the text that comes with its beginning
        item = item_body(begun, opened.item_id, "in_progress", [])
        written = self._event("response.output_item.added", {"output_index": opened.index, "item": item})
        if block.kind != "call":
            written += self._event("response.content_part.added", {**opened.part_place, "part": part_body(begun, [])})
        return written

    def _piece(self, text: str) -> bytes:
        opened = self._open
        assert opened is not None, "an item has begun"
        members: dict[str, Any] = {**opened.text_place, "delta": text}
        logprobs, self._logprobs = self._logprobs, []
        if opened.block.kind == "text":
            opened.logprobs += logprobs
            members["logprobs"] = logprobs
        return self._event(f"{_TEXT_EVENT[opened.block.kind]}.delta", members)

    def _end_item(self, status: str) -> bytes:
        """The ends of the open item, where there is one."""
        opened, self._open = self._open, None
        if opened is None:
            return b""
        block = opened.block
        if self._finish is not None and len(self._blocks.all) == 1:
            opened.logprobs += self._logprobs  # of the end, in a reply that is text alone
        item = item_body(block, opened.item_id, status, opened.logprobs)
        self._items.append(item)
        kind = _TEXT_EVENT[block.kind]
        if block.kind == "call":
            written = self._event(f"{kind}.done", {**opened.text_place, "name": block.name, "arguments": block.text})
        else:
            logprobs = {"logprobs": opened.logprobs} if block.kind == "text" else {}
            written = self._event(f"{kind}.done", {**opened.text_place, "text": block.text, **logprobs})
            part = part_body(block, opened.logprobs)
            written += self._event("response.content_part.done", {**opened.part_place, "part": part})
        return written + self._event("response.output_item.done", {"output_index": opened.index, "item": item})


class _OpenItem:
    """The item being written."""

    def __init__(self, block: Block, item_id: str, index: int) -> None:
        self.block = block
        self.item_id = item_id
        self.index = index
        self.logprobs: list[dict[str, Any]] = []
        self.part_place = {"item_id": item_id, "output_index": index, "content_index": 0}
        call_place = {"item_id": item_id, "output_index": index}
        self.text_place: dict[str, Any] = call_place if block.kind == "call" else self.part_place
