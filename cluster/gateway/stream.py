"""Tokens -> server-sent events.

What does not change over a stream (id, model, a choice's frame) is made once; a token costs one JSON string and a
few joins. Every stream ends with exactly one terminal: `[DONE]`, or an error event.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import ForetokenError
from cluster.gateway.disconnect import ClientDisconnected, wait_for_disconnect
from cluster.gateway.generation import Generation
from cluster.gateway.logprobs import CompletionLogprobs, chat_logprobs
from cluster.gateway.openai import ChatCompletionRequest, CompletionRequest
from cluster.gateway.replies import as_foretoken_error, error_body
from cluster.gateway.submit import Job
from cluster.gateway.tokenize import TextTokenizer
from cluster.gateway.usage import Usage
from cluster.protocol import Finish, RequestOutput

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Batch = Sequence[tuple[int, RequestOutput]]


class Events(ABC):
    """The events of one stream, as bytes."""

    object_name: str

    def __init__(self, job: Job) -> None:
        options = job.request.stream_options
        self.reply_id = job.reply_id
        self._job = job
        self._usage = Usage(job)
        self._final_usage = options is not None and options.include_usage
        self._running_usage = options is not None and options.continuous_usage_stats
        self._with_ids = job.request.return_token_ids
        head = {"id": job.reply_id, "object": self.object_name, "created": job.created, "model": job.model}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._frames = [self._head + b'{"index":%d,' % choice for choice in range(len(job.submits))]
        self._end = b'}],"usage":null}\n\n' if self._final_usage else b"}]}\n\n"
        self._started: set[int] = set()

    def events(self, batch: Batch) -> bytes:
        """The events of some outputs; empty where they give a reader nothing."""
        return b"".join([self._of(choice, output) for choice, output in batch])

    def closing(self) -> bytes:
        """What ends a stream that went well."""
        if not self._final_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(self._usage.body()) + b"}\n\n" + DONE

    def _of(self, choice: int, output: RequestOutput) -> bytes:
        self._usage.add(choice, output)
        first = choice not in self._started
        if first:
            self._started.add(choice)
        return self._output_events(choice, output, first)

    @abstractmethod
    def _output_events(self, choice: int, output: RequestOutput, first: bool) -> bytes: ...

    def _event(self, choice: int, members: bytes) -> bytes:
        """One event of one choice, given the members of its JSON object behind the index."""
        if self._running_usage:
            return self._frames[choice] + members + b'}],"usage":' + orjson.dumps(self._usage.body()) + b"}\n\n"
        return self._frames[choice] + members + self._end

    def _ids(self, choice: int, output: RequestOutput, first: bool) -> bytes:
        """The members of `return_token_ids`."""
        if not self._with_ids:
            return b""
        prompt = b',"prompt_token_ids":' + orjson.dumps(self._job.prompt_of(choice).ids) if first else b""
        return prompt + b',"token_ids":' + orjson.dumps(output.token_ids)


def _finish_members(finish: Finish | None) -> bytes:
    if finish is None:
        return b',"finish_reason":null'
    return b',"finish_reason":"%b","stop_reason":%b' % (finish.reason.encode(), orjson.dumps(finish.stop_reason))


class CompletionEvents(Events):
    """`text_completion` chunks; the last of a choice has its finish reason."""

    object_name = "text_completion"

    def __init__(self, job: Job, request: CompletionRequest, tokenizer: TextTokenizer) -> None:
        super().__init__(job)
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
        members = b'"text":' + orjson.dumps(text) + b',"logprobs":' + logprobs + _finish_members(output.finish)
        return self._event(choice, members + self._ids(choice, output, first))


class ChatEvents(Events):
    """`chat.completion.chunk`s: a choice's first has the role, its last an empty delta and the finish reason."""

    object_name = "chat.completion.chunk"

    def __init__(self, job: Job, request: ChatCompletionRequest) -> None:
        super().__init__(job)
        self._num_top = (request.top_logprobs or 0) if request.logprobs else None

    def _output_events(self, choice: int, output: RequestOutput, first: bool) -> bytes:
        events = b""
        if first:
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            events = self._event(choice, role)
        if output.text or output.logprobs or (self._with_ids and output.token_ids):
            logprobs = b"null"
            if self._num_top is not None:
                logprobs = orjson.dumps(chat_logprobs(output.logprobs, self._num_top))
            delta = b'"delta":{"content":' + orjson.dumps(output.text) + b'},"logprobs":' + logprobs
            events += self._event(choice, delta + b',"finish_reason":null' + self._ids(choice, output, first))
        if output.finish is not None:
            events += self._event(choice, b'"delta":{},"logprobs":null' + _finish_members(output.finish))
        return events


def error_event(error: ForetokenError) -> bytes:
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


class _TookNothingError(Exception):
    """The client does not read: nothing can be said to it."""


class EventStream(Response):
    """Writes a generation's events until its terminal; the client going away aborts it.

    `held` is what the request holds (its generation, its place), let go of at the end.
    """

    def __init__(self, generation: Generation, events: Events, first: Batch, held: ExitStack, timeout_s: float) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # a proxy that buffers would hold the tokens back
        self._generation = generation
        self._events = events
        self._first = first
        self._held = held
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(self._abort_on_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._write(send)
        except (_TookNothingError, OSError):
            pass
        finally:
            watcher.cancel()
            self._held.close()

    async def _abort_on_disconnect(self, receive: Receive) -> None:
        await wait_for_disconnect(receive)
        self._generation.abort("disconnect")

    async def _write(self, send: Send) -> None:
        try:
            batch = self._first
            while batch:
                data = self._events.events(batch)
                if data:
                    await self._send(send, data)
                batch = await self._generation.read()
            last = self._events.closing()
        except (_TookNothingError, OSError):
            raise
        except ClientDisconnected as error:
            last = error_event(error)
        except Exception as error:
            ours = as_foretoken_error(error)
            logger.warning("the stream of %s ended early: %s", self._events.reply_id, ours.code)
            last = error_event(ours)
        await self._send(send, last, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """Raises `_TookNothingError` where the client takes nothing for `timeout_s`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            self._generation.abort("slow_reader")
            logger.warning("the client of %s took nothing for %g s: cut", self._events.reply_id, self._timeout_s)
            raise _TookNothingError from None
