"""Streams of token ids as a client sees them, and what a disturbed one has lost, repeated or changed."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

DONE = b"[DONE]"


@dataclass
class TokenStream:
    """The tokens of one streamed completion or chat, and when each event came (`time.monotonic()`)."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    is_done: bool = False

    def pause_s(self, since_s: float) -> float:
        """The longest wait between two events, of those that ended after `since_s`; 0.0 where none did."""
        gaps = zip(self.times_s, self.times_s[1:], strict=False)
        return max((after - before for before, after in gaps if after > since_s), default=0.0)


async def read_stream(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    stream: TokenStream,
    timeout_s: float,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> None:
    """Send a streamed completion or chat and fill `stream` from its events. Whatever goes wrong is its `error`."""
    body = {**body, "stream": True, "return_token_ids": True}
    try:
        async with asyncio.timeout(timeout_s), session.post(url, json=body) as response:
            if response.status != 200:
                stream.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                if line.startswith(b"data:"):
                    _take(stream, line[5:].strip(), on_tokens)
    except TimeoutError:
        stream.error = f"no end within {timeout_s:g} s"
    except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    if not stream.is_done and not stream.error:
        stream.error = "the stream ended before [DONE]"


def _take(stream: TokenStream, data: bytes, on_tokens: Callable[[int], None]) -> None:
    if data == DONE:
        stream.is_done = True
        return
    event = msgspec.json.decode(data, type=dict[str, Any])
    if "error" in event:
        stream.error = str(event["error"])[:300]
    for choice in event.get("choices", []):
        if ids := choice.get("token_ids"):
            stream.ids += ids
            stream.times_s.append(time.monotonic())
            on_tokens(len(ids))
        stream.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason


@dataclass(frozen=True)
class Difference:
    """Two sequences of tokens beside each other, one by one."""

    checked: int  # of the undisturbed run
    lost: int = 0
    repeated: int = 0
    differing: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.checked + other.checked,
            self.lost + other.lost,
            self.repeated + other.repeated,
            self.differing + other.differing,
        )


def compare(got: Sequence[int], expected: Sequence[int]) -> Difference:
    """What `got` lacks of `expected` (lost), has too much (repeated, or said though nobody drew it), or has changed."""
    lost = repeated = differing = 0
    matcher = difflib.SequenceMatcher(None, expected, got, autojunk=False)
    for kind, start, end, got_start, got_end in matcher.get_opcodes():
        if kind == "delete":
            lost += end - start
        elif kind == "insert":
            repeated += got_end - got_start
        elif kind == "replace":
            both = min(end - start, got_end - got_start)
            differing += both
            lost += end - start - both
            repeated += got_end - got_start - both
    return Difference(len(expected), lost, repeated, differing)
