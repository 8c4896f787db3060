"""Whole replies: a job's outputs, gathered; JSON responses, and errors in the shape of the API that a path is of."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Scope

from cluster.errors import EngineError, ForetokenError
from cluster.gateway.generation import Generation
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput, TokenLogprobs

logger = logging.getLogger(__name__)

MESSAGES_PATH = "/v1/messages"
PREDICTED_TTFT_HEADER = "x-foretoken-predicted-ttft-ms"  # a header: milliseconds from a request's arrival
ANTHROPIC_KINDS = {  # docs.anthropic.com/en/api/errors
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def as_foretoken_error(error: Exception) -> ForetokenError:
    """`error` itself where it is one of ours; else a fault, logged (without its message, which may quote a prompt)."""
    if isinstance(error, ForetokenError):
        return error
    where = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("%s in the gateway\n%s", type(error).__name__, where)
    return EngineError("an internal error of the gateway; its log says where")


def error_response(error: ForetokenError, scope: Scope) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    if is_anthropics(scope):
        body = anthropic_error(error.message, error.status, scope["state"].get("request_id"))
    else:
        body = error_body(error)
    return JSONBytes(body, status=error.status, headers=headers)


def is_anthropics(scope: Scope) -> bool:
    """Whether a request's path is of Anthropic's API."""
    path: str = scope["path"]
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


class JSONBytes(Response):
    """A JSON response by orjson."""

    def __init__(self, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(orjson.dumps(value), status_code=status, headers=headers, media_type="application/json")


def error_body(error: ForetokenError) -> dict[str, Any]:
    return openai_error(error.message, kind=error.kind, code=error.code, param=error.param)


def openai_error(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error(message: str, status: int, request_id: str | None) -> dict[str, Any]:
    kind = ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


async def read_all(generation: Generation, job: Job) -> tuple[list[RequestOutput], Usage]:
    """Read `generation` to its end: each choice's outputs merged into one. Raises what ended it early."""
    usage = Usage(job)
    merged = [_Merged() for _ in job.submits]
    while outputs := await generation.read():
        for choice, output in outputs:
            usage.add(choice, output)
            merged[choice].add(output)
    return [item.output() for item in merged], usage


class _Merged:
    """The outputs of one choice, gathered."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._finish: Finish | None = None

    def add(self, output: RequestOutput) -> None:
        self._texts.append(output.text)
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        self._finish = output.finish

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id="",
            index=0,
            token_ids=self._token_ids,
            text="".join(self._texts),
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finish=self._finish,
        )
