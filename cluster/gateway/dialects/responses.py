"""`POST /v1/responses`, as OpenAI has it (platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from cluster.errors import InvalidValueError, PreviousResponseError
from cluster.gateway.dialects.base import Dialect, Events
from cluster.gateway.dialects.blocks import Block, ThoughtTokens, read_blocks
from cluster.gateway.dialects.response_body import (
    asked_of,
    item_body,
    new_item_id,
    response_body,
    status_of,
    text_logprobs,
    usage_body,
)
from cluster.gateway.dialects.response_events import ResponseEvents
from cluster.gateway.fields import validate
from cluster.gateway.logprobs import chat_logprobs
from cluster.gateway.openai import ChatCompletionRequest, ChatMessage
from cluster.gateway.openai_tools import MadeCall
from cluster.gateway.response_store import StoredResponse, TenantResponses
from cluster.gateway.responses import AssistantTurn, ResponsesRequest
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput

_INPUT_PREFIX = {"reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_", "message": "msg_"}


class Responses(Dialect[ResponsesRequest]):
    """`kept` is what the caller's tenant may go on from, `thoughts_end` the token that ends thoughts, if one does."""

    request_type = ResponsesRequest
    id_prefix = "resp_"
    params = {  # noqa: RUF012  (a class variable of the base)
        "messages": "input",
        "tool_calls": "input",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "max_completion_tokens": "max_output_tokens",
    }

    def __init__(self, kept: TenantResponses, thoughts_end: int | None) -> None:
        self._kept = kept
        self._thoughts_end = thoughts_end

    def generation(self, asked: ResponsesRequest) -> ChatCompletionRequest:
        if asked.previous_response_id is None:
            return asked.chat(())
        previous = self._kept.find(asked.previous_response_id)
        if previous is None:
            hours = self._kept.store.max_age_s / 3600
            raise PreviousResponseError(
                f"previous_response_id: no response {asked.previous_response_id!r:.80} is kept here (each is for "
                f"{hours:g} h at most, in one gateway's memory): send the conversation as input",
                param="previous_response_id",
            )
        return asked.chat(previous.conversation)

    def events(self, job: Job) -> Events:
        return ResponseEvents(job, self._thoughts_end, self._end)

    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        [output] = choices
        blocks = read_blocks(job.make_parser(), output.text) or [Block("text")]
        thoughts = ThoughtTokens(self._thoughts_end)
        thoughts.add(output.token_ids)
        assert output.finish is not None, "a generation ends with each choice's finish"
        statuses = ["completed"] * (len(blocks) - 1) + [status_of(output.finish)]
        asked = asked_of(job)
        logprobs = text_logprobs(blocks, output.logprobs) if asked.wants_logprobs else [[] for _ in blocks]
        items = [
            item_body(block, new_item_id(block), status, chat_logprobs(tokens, asked.top_logprobs or 0)["content"])
            for block, status, tokens in zip(blocks, statuses, logprobs, strict=True)
        ]
        return self._end(job, blocks, items, usage_body(usage, thoughts.total(blocks)), output.finish)

    def _end(
        self, job: Job, blocks: list[Block], items: list[dict[str, Any]], usage: dict[str, Any], finish: Finish
    ) -> dict[str, Any]:
        """The response at its end, which is kept from here on where it is to be."""
        status = status_of(finish)
        body = response_body(job) | {
            "status": status,
            "output": items,
            "usage": usage,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()) if status == "completed" else None,
        }
        asked = asked_of(job)
        if asked.store and not self._kept.keep(self._stored(job, body, blocks)):
            body["store"] = False  # it is larger than all that may be kept
        return body

    def _stored(self, job: Job, body: dict[str, Any], blocks: list[Block]) -> StoredResponse:
        asked = asked_of(job)
        assert isinstance(job.request, ChatCompletionRequest)
        previous = None if asked.previous_response_id is None else self._kept.find(asked.previous_response_id)
        conversation = job.request.messages[0 if asked.instructions is None else 1 :]
        num_known = 0 if previous is None else len(previous.conversation)
        listed = [item.as_listed(item.id or _INPUT_PREFIX[item.type] + uuid.uuid4().hex) for item in asked.input]
        return StoredResponse(
            job.reply_id,
            orjson.dumps(body),
            tuple(map(orjson.dumps, listed)),
            (*conversation[num_known:], *_as_messages(blocks)),
            previous,
        )


def _as_messages(blocks: Sequence[Block]) -> list[ChatMessage]:
    """The reply as the model is shown it later; a call that was cut off, or that none can answer, is left out."""
    turn = AssistantTurn()
    for block in blocks:
        if block.kind == "thoughts":
            turn.thoughts.append(block.text)
        elif block.kind == "text":
            turn.texts.append(block.text)
        elif block.is_whole_call:
            made = {"id": block.call_id, "function": {"name": block.name, "arguments": block.text}}
            try:
                turn.calls.append(validate(MadeCall, made))
            except InvalidValueError:
                continue
    messages: list[ChatMessage] = []
    turn.end(messages)
    return messages
