"""`POST /v1/completions`, as OpenAI and vLLM have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.gateway.dialects.base import Dialect, Events
from cluster.gateway.dialects.openai_body import common_members, reply_body
from cluster.gateway.dialects.openai_events import ChunkEvents, finish_members
from cluster.gateway.logprobs import CompletionLogprobs
from cluster.gateway.openai import CompletionRequest
from cluster.gateway.submit import Job
from cluster.gateway.tokenizer import TextTokenizer
from cluster.gateway.usage import Usage
from cluster.protocol import RequestOutput


class Completions(Dialect[CompletionRequest]):
    request_type = CompletionRequest
    id_prefix = "cmpl-"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def generation(self, asked: CompletionRequest) -> CompletionRequest:
        return asked

    def events(self, job: Job) -> Events:
        return CompletionEvents(job, self._tokenizer)

    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        made = [self._choice(job, index, output) for index, output in enumerate(choices)]
        return reply_body(job, "text_completion", made, usage)

    def _choice(self, job: Job, index: int, output: RequestOutput) -> dict[str, Any]:
        request = _request(job)
        echoed = job.prompt_of(index) if request.echo else None
        logprobs = None
        if request.logprobs is not None:
            logprobs = CompletionLogprobs(request, self._tokenizer).piece(output, echoed)
        assert output.finish is not None, "a generation ends with each choice's finish"
        return {
            "index": index,
            "text": output.text if echoed is None else echoed.text + output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish.reason,
            **common_members(job, index, output),
        }


class CompletionEvents(ChunkEvents):
    """`text_completion` chunks; the last of a choice has its finish reason."""

    object_name = "text_completion"

    def __init__(self, job: Job, tokenizer: TextTokenizer) -> None:
        super().__init__(job)
        request = _request(job)
        self._echo = request.echo
        self._logprobs = (
            None if request.logprobs is None else [CompletionLogprobs(request, tokenizer) for _ in job.submits]
        )

    def _output_events(self, choice: int, output: RequestOutput, first: bool) -> bytes:
        echoed = self._job.prompt_of(choice) if first and self._echo else None
        text = output.text if echoed is None else echoed.text + output.text
        logprobs = b"null"
        if self._logprobs is not None:
            logprobs = orjson.dumps(self._logprobs[choice].piece(output, echoed))
        elif not text and output.finish is None and not self._with_ids:
            return b""
        finish = output.finish
        ends = finish_members(None, None) if finish is None else finish_members(finish.reason, finish.stop_reason)
        members = b'"text":' + orjson.dumps(text) + b',"logprobs":' + logprobs + ends
        return self._event(choice, members + self._ids(choice, output, first))


def _request(job: Job) -> CompletionRequest:
    assert isinstance(job.request, CompletionRequest)
    return job.request
