"""`POST /v1/messages` and its `count_tokens`, as Anthropic has them (docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.errors import ForetokenError
from cluster.gateway.anthropic import CountTokensRequest, MessagesRequest
from cluster.gateway.dialects.base import Batch, Dialect, Events, RequestForm
from cluster.gateway.dialects.blocks import Block, Blocks, ThoughtTokens, read_blocks
from cluster.gateway.openai import ChatCompletionRequest
from cluster.gateway.replies import anthropic_error
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput

PARAMS = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "tool_calls": "messages",
    "stop": "stop_sequences",
}
_DELTA = {
    "thoughts": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
_BEGUN: dict[str, dict[str, Any]] = {
    "thoughts": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class TokenCounts(RequestForm[CountTokensRequest]):
    """`count_tokens`: the prompt alone."""

    request_type = CountTokensRequest
    params = PARAMS

    def generation(self, asked: CountTokensRequest) -> ChatCompletionRequest:
        return asked.chat()


class Messages(Dialect[MessagesRequest]):
    """`thoughts_end` is the token that ends thoughts, if one does."""

    request_type = MessagesRequest
    id_prefix = "msg_"
    params = PARAMS

    def __init__(self, thoughts_end: int | None) -> None:
        self._thoughts_end = thoughts_end

    def generation(self, asked: MessagesRequest) -> ChatCompletionRequest:
        return asked.chat()

    def events(self, job: Job) -> Events:
        return MessageEvents(job, self._thoughts_end)

    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        [output] = choices
        blocks = read_blocks(job.make_parser(), output.text)
        thoughts = ThoughtTokens(self._thoughts_end)
        thoughts.add(output.token_ids)
        assert output.finish is not None, "a generation ends with each choice's finish"
        return message_body(
            job,
            content=[_block_body(block) for block in blocks],
            usage=usage_body(usage, thoughts.total(blocks)),
            **stop_members(output.finish, blocks),
        )


def message_body(job: Job, **members: Any) -> dict[str, Any]:
    """A message at its beginning, but for `members`."""
    return {
        "id": job.reply_id,
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    } | members


def usage_body(usage: Usage, num_thought: int) -> dict[str, Any]:
    """The input tokens are those that were not found, as Anthropic counts them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": num_thought},
    }


def stop_members(finish: Finish, blocks: Sequence[Block]) -> dict[str, Any]:
    if finish.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(finish.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop_reason}
    called = any(block.kind == "call" for block in blocks)
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _block_body(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "thoughts":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    # of a call that was cut off no object can be made; its stop_reason tells
    made = orjson.loads(block.text or "{}") if block.is_whole_call else {}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": made}


class MessageEvents(Events):
    """`message_start`, each block from its start to its stop, `message_delta`, `message_stop`; or an `error`."""

    def __init__(self, job: Job, thoughts_end: int | None) -> None:
        super().__init__(job)
        self._job = job
        self._usage = Usage(job)
        self._thoughts = ThoughtTokens(thoughts_end)
        self._parser = job.make_parser()
        self._blocks = Blocks()
        self._open: Block | None = None
        self._finish: Finish | None = None
        self._has_begun = False

    def events(self, batch: Batch) -> bytes:
        written = b""
        for _, output in batch:
            self._usage.add(0, output)
            if not self._has_begun:
                self._has_begun = True
                message = message_body(self._job, usage=usage_body(self._usage, 0))
                written += _event("message_start", {"message": message}) + _PING
            self._thoughts.add(output.token_ids)
            written += self._of(output)
        return written

    def closing(self) -> bytes:
        assert self._finish is not None, "a generation ends with its finish"
        written = self._end_block()
        usage = usage_body(self._usage, self._thoughts.total(self._blocks.all))
        ends = {"delta": stop_members(self._finish, self._blocks.all), "usage": usage}
        return written + _event("message_delta", ends) + _event("message_stop", {})

    def failing(self, error: ForetokenError) -> bytes:
        body = anthropic_error(error.message, error.status, self._job.request_id or None)
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"

    def _of(self, output: RequestOutput) -> bytes:
        deltas = self._parser.feed(output.text) if output.text else []
        if output.finish is not None:
            self._finish = output.finish
            deltas += self._parser.finish()
        written = b""
        for delta in deltas:
            block, piece = self._blocks.add(delta)
            if block is not self._open:
                written += self._end_block() + self._begin_block(block)
            if piece:
                kind, member = _DELTA[block.kind]
                written += self._block_event("content_block_delta", {"delta": {"type": kind, member: piece}})
        return written

    def _begin_block(self, block: Block) -> bytes:
        self._open = block
        begun = _BEGUN.get(block.kind) or {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        return self._block_event("content_block_start", {"content_block": begun})

    def _end_block(self) -> bytes:
        """The end of the open block, where there is one; it is the last but for one that may just begin."""
        opened = self._open
        if opened is None:
            return b""
        index = next(place for place, block in enumerate(self._blocks.all) if block is opened)
        self._open, written = None, b""
        if opened.kind == "thoughts":
            delta = {"type": "signature_delta", "signature": ""}
            written = _event("content_block_delta", {"index": index, "delta": delta})
        return written + _event("content_block_stop", {"index": index})

    def _block_event(self, kind: str, members: dict[str, Any]) -> bytes:
        return _event(kind, {"index": len(self._blocks.all) - 1, **members})


def _event(kind: str, members: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **members}) + b"\n\n"
