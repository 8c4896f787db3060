"""What callers may not exceed: a body's size, time and nesting; the number of open requests, and their bodies' sum."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from cluster.errors import DrainingError, OverloadedError, RequestError, RequestTooLargeError

MAX_JSON_DEPTH = 128
MAX_HELD_BYTES = 256 * 2**20  # of the bodies of all open requests; what is made of a body is as large, and stays
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


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `RequestError` for what is not one, or is nested deeper than `MAX_JSON_DEPTH`."""
    try:
        value = orjson.loads(body)
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


class Admission:
    """How many requests are open, how large their bodies are together, and whether more are let in."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_open = 0
        self.held_bytes = 0
        self.draining = False

    @contextmanager
    def slot(self) -> Iterator[Callable[[int], None]]:
        """One request's place. Raises `DrainingError`, or `OverloadedError` when all are taken.

        What it yields is called with the bytes of the body as they come, which count until the place is given back;
        it raises `OverloadedError` when the open requests would hold more than `MAX_HELD_BYTES`.
        """
        if self.draining:
            raise DrainingError("the server is shutting down; send the request to another", retry_after_s=1.0)
        if self.num_open >= self._max_open:
            raise OverloadedError(f"{self.num_open} requests are open, as many as there may be", retry_after_s=1.0)
        self.num_open += 1
        self._idle.clear()
        own_bytes = 0

        def hold(num_bytes: int) -> None:
            nonlocal own_bytes
            if self.held_bytes + num_bytes > MAX_HELD_BYTES:
                raise OverloadedError(
                    f"the bodies of the {self.num_open} open requests are {self.held_bytes} bytes; with this one they "
                    f"would be over {MAX_HELD_BYTES}: try again later",
                    retry_after_s=1.0,
                )
            own_bytes += num_bytes
            self.held_bytes += num_bytes

        try:
            yield hold
        finally:
            self.held_bytes -= own_bytes
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether all open requests ended within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
