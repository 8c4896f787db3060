"""What each API has of its own: the shape of a request, of a whole reply, of a stream's events and of an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import orjson

from cluster.errors import ForetokenError
from cluster.gateway.fields import RequestModel
from cluster.gateway.openai import GenerationRequest
from cluster.gateway.replies import error_body
from cluster.gateway.submit import Job
from cluster.gateway.usage import Usage
from cluster.protocol import RequestOutput

DONE = b"data: [DONE]\n\n"
Batch = Sequence[tuple[int, RequestOutput]]
Asked = TypeVar("Asked", bound=RequestModel)


class Events(ABC):
    """The events of one stream, as bytes."""

    def __init__(self, job: Job) -> None:
        self.reply_id = job.reply_id

    @abstractmethod
    def events(self, batch: Batch) -> bytes:
        """The events of some outputs; empty where they give a reader nothing."""

    @abstractmethod
    def closing(self) -> bytes:
        """What ends a stream that went well."""

    def failing(self, error: ForetokenError) -> bytes:
        """What ends a stream that went wrong."""
        return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


class Dialect(ABC, Generic[Asked]):
    """One API. Without state of one request: that is in the `Job` and its `Events`."""

    request_type: type[Asked]
    id_prefix: ClassVar[str]  # of a reply's id
    params: ClassVar[dict[str, str]] = {}  # what this API calls a field of `GenerationRequest`, where it differs

    @abstractmethod
    def generation(self, asked: Asked) -> GenerationRequest:
        """The generation that a request asks for. Raises `RequestError`s."""

    @abstractmethod
    def events(self, job: Job) -> Events:
        """The events of a streamed reply."""

    @abstractmethod
    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """A whole reply; `choices` are the outputs of each choice, merged into one."""

    def in_its_words(self, error: ForetokenError) -> ForetokenError:
        """`error`, with the field at fault under the name that this API knows it by."""
        if error.param is not None:
            head, *rest = error.param.partition(".")
            error.param = self.params.get(head, head) + "".join(rest)
        return error
