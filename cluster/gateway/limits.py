"""What callers may not exceed: a body's size, time and nesting; the number of open requests, and what they hold."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from cluster.errors import DrainingError, ForetokenError, OverloadedError, RequestError, RequestTooLargeError
from cluster.gateway.backlog import Prediction
from cluster.gateway.generation import Generation

MAX_JSON_DEPTH = 128
MAX_JSON_VALUES = 1_000_000  # of a body, commas within its texts included: each is an object of Python's
VALUE_BYTES = 64  # about what one of those holds
MAX_HELD_BYTES = 256 * 2**20  # of all open requests: their bodies, the values that are made of these, long replies
FLUSH_S = 1.0  # for the last replies to be written after the drain's end
_NOT_A_NUMBER = re.compile(rb'"([^"\\]{1,64})"\s*:\s*(-?(?:NaN|Infinity))\b')


async def read_body(
    chunks: AsyncIterator[bytes], *, length: str | None, max_bytes: int, timeout_s: float, hold: Callable[[int], None]
) -> bytes:
    """The whole body; `length` is its Content-Length, where there is one.

    `hold` is told the size of each piece before that is kept. Raises what it raises, `RequestTooLargeError`, before
    reading where the length tells, and `RequestError` past `timeout_s`.
    """
    too_large = RequestTooLargeError(f"the body is over {max_bytes} bytes")
    if length is not None and length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                hold(len(chunk))
                parts.append(chunk)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(parts)


def check_ttft(prediction: Prediction, max_ttft_s: float, waited_s: float = 0.0) -> None:
    """Raise `OverloadedError` where a request's last first token would come too late, with when to try again.

    A request of several sequences is in time when each of them is. One that takes longer than `max_ttft_s` by itself
    may wait for so long. It has waited for `waited_s` already.
    """
    bound_s = max_ttft_s if prediction.alone_s <= max_ttft_s else prediction.alone_s + max_ttft_s
    if (late_s := waited_s + prediction.ttft_s - bound_s) > 0:
        raise OverloadedError(
            f"the last of the request's sequences would have its first token after some {prediction.ttft_s:.1f} s "
            f"more, and {max(0.0, bound_s - waited_s):.1f} s are allowed: try again later",
            retry_after_s=late_s,
        )


def num_values(body: bytes) -> int:
    """How many values a JSON text may have, at most: a value but the first stands behind one of these."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `RequestError` for what is not one, or is nested deeper than `MAX_JSON_DEPTH`, and
    `RequestTooLargeError` for one of more than `MAX_JSON_VALUES`.
    """
    if num_values(body) > MAX_JSON_VALUES:
        raise RequestTooLargeError(f"the body has more than {MAX_JSON_VALUES} values (or commas in its texts)")
    try:
        value = _loads(body)
    except orjson.JSONDecodeError as error:
        culprit = _NOT_A_NUMBER.search(body)
        if culprit is None:
            raise RequestError(f"the body is not valid JSON: {error}") from None
        name, number = (group.decode("utf-8", "replace") for group in culprit.groups())
        raise RequestError(
            f"the body is not valid JSON: {error} ({name} is {number}; a JSON number is finite)", param=name
        ) from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_name(value)}")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise RequestError(f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _loads(body: bytes) -> Any:
    """Without the garbage collector, which otherwise looks through ever more new values, all threads waiting."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        if was_enabled:
            gc.enable()


def _json_name(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _is_deeper(value: dict[str, Any], limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        children = (item for parent in level for item in (parent.values() if type(parent) is dict else parent))
        level = [item for item in children if type(item) is dict or type(item) is list]
        if not level:
            return False
    return True


@dataclass(slots=True, eq=False)
class Place:
    """The place of one open request among those that there may be, and what an operator sees of it."""

    admission: Admission
    request_id: str
    tenant: str
    began: float = field(default_factory=time.monotonic)
    held_bytes: int = 0  # of its body, and of a reply that is kept until it is whole
    num_prompt_tokens: int = 0
    generation: Generation | None = None  # once it was given to a worker, or waits for one
    _task: asyncio.Task[Any] | None = None
    _error: ForetokenError | None = None

    @property
    def state(self) -> str:
        if self.generation is not None:
            return "running" if self.generation.num_tokens else "waiting"
        return "reading" if self._task is None else "preparing"

    def hold(self, num_bytes: int) -> None:
        """Count so many bytes more, until the place is given back. Raises `OverloadedError` over the bound."""
        self.admission.hold(self, num_bytes)

    def begin(self) -> None:
        """The task that works on it is the current one. Raises what it was aborted with meanwhile."""
        self._task = asyncio.current_task()
        self.check()

    def check(self) -> None:
        """Raise what it was aborted with, if it was."""
        if self._error is not None:
            raise self._error

    def run(self, generation: Generation, num_prompt_tokens: int) -> None:
        self.generation, self.num_prompt_tokens = generation, num_prompt_tokens

    def abort(self, error: ForetokenError) -> None:
        """End the request with `error`, however far it is; before its body is there, as soon as that is."""
        self._error = error
        if self.generation is not None:
            self.generation.fail(error, reason="admin")
        elif self._task is not None:
            self._task.cancel()  # who waits for it asks `check`


class Admission:
    """Which requests are open, how many bytes they hold together, and whether more are let in."""

    def __init__(self, max_open: int, max_per_tenant: int = 0) -> None:
        """`max_per_tenant` 0: a tenant may have all of them."""
        self._max_open = max_open
        self._max_per_tenant = max_per_tenant
        self._places: dict[Place, None] = {}  # in the order of their beginning
        self._num_of_tenant: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.held_bytes = 0
        self.draining = False

    @property
    def num_open(self) -> int:
        return len(self._places)

    @property
    def places(self) -> list[Place]:
        """Those of the open requests, the oldest first."""
        return list(self._places)

    @contextmanager
    def slot(self, request_id: str = "", tenant: str = "") -> Iterator[Place]:
        """One request's place. Raises `DrainingError`, or `OverloadedError` when all, or its tenant's, are taken.

        `tenant` "": nobody in particular, whom only the bound of all concerns.
        """
        if self.draining:
            raise DrainingError("the server is shutting down; send the request to another", retry_after_s=1.0)
        if self.num_open >= self._max_open:
            raise OverloadedError(f"{self.num_open} requests are open, as many as there may be", retry_after_s=1.0)
        if tenant and 0 < self._max_per_tenant <= self._num_of_tenant[tenant]:
            raise OverloadedError(
                f"{self._num_of_tenant[tenant]} requests of yours are open, as many as there may be", retry_after_s=1.0
            )
        place = Place(self, request_id, tenant)
        self._places[place] = None
        self._num_of_tenant[tenant] += 1
        self._idle.clear()
        try:
            yield place
        finally:
            self.held_bytes -= place.held_bytes
            del self._places[place]
            self._num_of_tenant[tenant] -= 1
            if not self._num_of_tenant[tenant]:
                del self._num_of_tenant[tenant]
            if not self._places:
                self._idle.set()

    def hold(self, place: Place, num_bytes: int) -> None:
        """Raises `OverloadedError` when the open requests would hold more than `MAX_HELD_BYTES`."""
        if self.held_bytes + num_bytes > MAX_HELD_BYTES:
            raise OverloadedError(
                f"the {self.num_open} open requests hold {self.held_bytes} bytes of bodies and replies; with "
                f"{num_bytes} more they would be over {MAX_HELD_BYTES}: try again later",
                retry_after_s=1.0,
            )
        place.held_bytes += num_bytes
        self.held_bytes += num_bytes

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether all open requests ended within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
