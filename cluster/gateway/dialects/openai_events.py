"""The chunks that OpenAI's two older endpoints stream.

What does not change over a stream (id, model, a choice's frame) is made once; a token costs one JSON string and a
few joins.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import orjson

from cluster.gateway.dialects.base import DONE, Batch, Events
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import RequestOutput


class ChunkEvents(Events):
    """One chunk an output; the last of a choice has its finish reason, the last of all is `[DONE]`."""

    object_name: ClassVar[str]

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        options = job.request.stream_options
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
        return b"".join([self._of(choice, output) for choice, output in batch])

    def closing(self) -> bytes:
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


def finish_members(reason: str | None, stop_reason: str | int | None) -> bytes:
    """The members that tell how a choice ended; None: it goes on."""
    if reason is None:
        return b',"finish_reason":null'
    return b',"finish_reason":"%b","stop_reason":%b' % (reason.encode(), orjson.dumps(stop_reason))
