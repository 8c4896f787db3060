"""The members of a response and of its output items, as OpenAI's reference has them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from cluster.gateway.dialects.blocks import Block
from cluster.gateway.openai_tools import NamedTool
from cluster.gateway.responses import ResponsesRequest
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, TokenLogprobs

_ID_PREFIX = {"thoughts": "rs_", "text": "msg_", "call": "fc_"}


def asked_of(job: Job) -> ResponsesRequest:
    assert isinstance(job.asked, ResponsesRequest)
    return job.asked


def status_of(finish: Finish) -> str:
    return "incomplete" if finish.reason == "length" else "completed"


def response_body(job: Job) -> dict[str, Any]:
    """The response at its beginning."""
    asked = asked_of(job)
    sampling = job.submits[0].sampling
    choice = asked.tool_choice or "auto"
    text_format = asked.text_format.model_dump(by_alias=True, exclude_unset=True)
    return {
        "id": job.reply_id,
        "object": "response",
        "created_at": job.created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "model": job.model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": asked.effort, "summary": None},
        "service_tier": "default",
        "store": asked.store,
        "temperature": sampling.temperature,
        "text": {"format": text_format},
        "tool_choice": {"type": "function", "name": choice.name} if isinstance(choice, NamedTool) else choice,
        "tools": [tool.model_dump(include={"type", "name", "description", "parameters"}) for tool in asked.tools],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": asked.metadata,
    }


def usage_body(usage: Usage, num_thought: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def new_item_id(block: Block) -> str:
    return _ID_PREFIX[block.kind] + uuid.uuid4().hex


def item_body(block: Block, item_id: str, status: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """An output item; one that has just begun has no parts yet."""
    if block.kind == "call":
        return {
            "id": item_id,
            "type": "function_call",
            "status": status,
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
        }
    content = [] if status == "in_progress" else [part_body(block, logprobs)]
    if block.kind == "thoughts":
        return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": content}
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def part_body(block: Block, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if block.kind == "thoughts":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


def text_logprobs(blocks: Sequence[Block], tokens: list[TokenLogprobs]) -> list[list[TokenLogprobs]]:
    """For each block the tokens that its text is made of, found by their bytes; none where they are not found.

    All of a reply that is text alone, its end included, as in a chat.
    """
    if [block.kind for block in blocks] == ["text"]:
        return [tokens]
    written = b"".join(item.token for item in tokens)
    found: list[list[TokenLogprobs]] = []
    cursor = 0
    for block in blocks:
        text = block.text.encode()
        start = written.find(text, cursor)
        if block.kind != "text" or start < 0:
            found.append([])
        else:
            found.append(_between(tokens, start, start + len(text)))
        cursor = max(cursor, start + len(text))
    return found


def _between(tokens: list[TokenLogprobs], start: int, end: int) -> list[TokenLogprobs]:
    """The tokens that have a part of the bytes from `start` to `end`."""
    kept, place = [], 0
    for item in tokens:
        begin, place = place, place + len(item.token)
        if begin < end and place > start:
            kept.append(item)
    return kept
