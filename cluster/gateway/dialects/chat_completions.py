"""`POST /v1/chat/completions`, as OpenAI and vLLM have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.gateway.deltas import Content, Delta, Reasoning, ToolCall, gather
from cluster.gateway.dialects.base import Dialect, Events
from cluster.gateway.dialects.openai_body import common_members, reply_body
from cluster.gateway.dialects.openai_events import ChunkEvents, finish_members
from cluster.gateway.logprobs import chat_logprobs
from cluster.gateway.openai import ChatCompletionRequest
from cluster.gateway.openai_tools import NamedTool
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput


class ChatCompletions(Dialect[ChatCompletionRequest]):
    request_type = ChatCompletionRequest
    id_prefix = "chatcmpl-"

    def generation(self, asked: ChatCompletionRequest) -> ChatCompletionRequest:
        return asked

    def events(self, job: Job) -> Events:
        return ChatEvents(job)

    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        made = [_choice(job, index, output) for index, output in enumerate(choices)]
        return reply_body(job, "chat.completion", made, usage)


def _choice(job: Job, index: int, output: RequestOutput) -> dict[str, Any]:
    request = _request(job)
    reply = gather(job.make_parser(), output.text)
    # a reply that is nothing but calls has no content, as OpenAI writes it
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if reply.calls and not reply.content else reply.content,
        "refusal": None,
    }
    if reply.reasoning:
        message |= {"reasoning": reply.reasoning, "reasoning_content": reply.reasoning}
    if reply.calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
    assert output.finish is not None, "a generation ends with each choice's finish"
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(output.logprobs, request.top_logprobs or 0) if request.logprobs else None,
        "finish_reason": finish_reason(output.finish, bool(reply.calls) and not _is_named(request)),
        **common_members(job, index, output),
    }


class ChatEvents(ChunkEvents):
    """`chat.completion.chunk`s: a choice's first has the role, its last an empty delta and the finish reason."""

    object_name = "chat.completion.chunk"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        request = _request(job)
        self._num_top = (request.top_logprobs or 0) if request.logprobs else None
        self._parsers = [job.make_parser() for _ in job.submits]
        self._has_calls: set[int] = set()
        self._is_named = _is_named(request)

    def _output_events(self, choice: int, output: RequestOutput, first: bool) -> bytes:
        events = b""
        if first:
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            events = self._event(choice, role)
        parser = self._parsers[choice]
        deltas = parser.feed(output.text) if output.text else []
        if output.finish is not None:
            deltas += parser.finish()
        # the tokens' own members go with the first delta of their step, or alone where all text is held back
        if deltas or output.logprobs or (self._with_ids and output.token_ids):
            logprobs = b"null"
            if self._num_top is not None:
                logprobs = orjson.dumps(chat_logprobs(output.logprobs, self._num_top))
            ids = self._ids(choice, output, first)
            for delta in deltas or [Content("")]:
                self._note(choice, delta)
                members = b'"delta":' + _delta(delta) + b',"logprobs":' + logprobs + b',"finish_reason":null'
                events += self._event(choice, members + ids)
                logprobs, ids = b"null", b""
        if output.finish is not None:
            reason = finish_reason(output.finish, choice in self._has_calls and not self._is_named)
            ends = finish_members(reason, output.finish.stop_reason)
            events += self._event(choice, b'"delta":{},"logprobs":null' + ends)
        return events

    def _note(self, choice: int, delta: Delta) -> None:
        if isinstance(delta, ToolCall):
            self._has_calls.add(choice)


def _delta(delta: Delta) -> bytes:
    if isinstance(delta, Content):
        return b'{"content":' + orjson.dumps(delta.text) + b"}"
    if isinstance(delta, Reasoning):  # vLLM's newer name and the older one that clients read
        return orjson.dumps({"reasoning": delta.text, "reasoning_content": delta.text})
    if isinstance(delta, ToolCall):
        function = {"name": delta.name, "arguments": ""}
        begun = {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}
        return orjson.dumps({"tool_calls": [begun]})
    return orjson.dumps({"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]})


def finish_reason(finish: Finish, has_calls: bool) -> str:
    """A reply that ended by itself behind calls waits for what they give."""
    return "tool_calls" if has_calls and finish.reason == "stop" else finish.reason


def _is_named(request: ChatCompletionRequest) -> bool:
    """Who names the one tool to call takes the reply for its arguments: OpenAI ends it with "stop"."""
    return isinstance(request.tool_choice, NamedTool)


def _request(job: Job) -> ChatCompletionRequest:
    assert isinstance(job.request, ChatCompletionRequest)
    return job.request
