"""What the whole replies of OpenAI's two older endpoints share."""

from __future__ import annotations

from typing import Any

from cluster.gateway.logprobs import prompt_logprobs
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import RequestOutput


def reply_body(job: Job, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": job.reply_id,
        "object": kind,
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": usage.body(),
    }


def common_members(job: Job, index: int, output: RequestOutput) -> dict[str, Any]:
    """The members of a choice behind its finish reason."""
    assert output.finish is not None, "a generation ends with each choice's finish"
    members: dict[str, Any] = {"stop_reason": output.finish.stop_reason}
    if job.request.prompt_logprobs is not None:
        members["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], job.request.prompt_logprobs)
    if job.request.return_token_ids:
        members |= {"prompt_token_ids": list(job.prompt_of(index).ids), "token_ids": output.token_ids}
    return members
