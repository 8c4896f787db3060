"""What each API has of its own: the shape of a request, of a whole reply, of a stream's events and of an error."""

from __future__ import annotations

import re
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
_HEAD = re.compile(r"[^.\[]*")
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


class RequestForm(ABC, Generic[Asked]):
    """What requests of one kind look like, and the generation that they are about."""

    request_type: type[Asked]
    params: ClassVar[dict[str, str]] = {}  # what this API calls a field of `GenerationRequest`, where it differs

    @abstractmethod
    def generation(self, asked: Asked) -> GenerationRequest:
        """The generation that a request asks for. Raises `RequestError`s."""

    def in_its_words(self, error: ForetokenError) -> ForetokenError:
        """`error`, with the field at fault under the name that this API knows it by."""
        if error.param is not None:
            head = _HEAD.match(error.param)
            assert head is not None, "a parameter begins with a field's name"
            known = head.group()
            name = self.params.get(known, known)
            if name != known:
                error.message = error.message.replace(f"{known}:", f"{name}:", 1)
            error.param = name + error.param[head.end() :]
        return error


class Dialect(RequestForm[Asked]):
    """One API. Without state of one request: that is in the `Job` and its `Events`."""

    id_prefix: ClassVar[str]  # of a reply's id

    @abstractmethod
    def events(self, job: Job) -> Events:
        """The events of a streamed reply."""

    @abstractmethod
    def body(self, job: Job, choices: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """A whole reply; `choices` are the outputs of each choice, merged into one."""
