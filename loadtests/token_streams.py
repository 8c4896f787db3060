"""Streams of tokens as a client sees them, and what a disturbed one has lost, repeated or changed."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import aiohttp
import msgspec

DONE = b"[DONE]"


@dataclass
class Sample:
    """One choice of a reply, and when each of its events came (`time.monotonic()`)."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)  # of a chat that asks for them: each token's, as JSON
    times_s: list[float] = field(default_factory=list)  # of the events with tokens, and of its end
    text: str = ""
    finish_reason: str | None = None


@dataclass
class TokenStream:
    """A streamed completion or chat. Times are `time.monotonic()`."""

    samples: list[Sample] = field(default_factory=lambda: [Sample()])  # by choice
    sent_s: float = 0.0
    ended_s: float = 0.0
    error: str = ""
    is_done: bool = False
    is_cut: bool = False  # the connection broke, or there was none: nobody refused, and nobody said that it went wrong

    @property
    def ids(self) -> list[int]:
        """Of the first choice, the only one unless the request says `n`."""
        return self.samples[0].ids

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.samples[0].text

    def pause_s(self, since_s: float) -> float:
        """The longest wait of a choice that ended after `since_s`; 0.0 where none did.

        A choice waits from the sending to its first token, from event to event, and where its end never came, to the
        end of the stream.
        """
        waits = (wait for sample in self.samples for wait in self._waits(sample))
        return max((after - before for before, after in waits if after > since_s), default=0.0)

    def num_events(self, since_s: float) -> int:
        """How many events brought tokens after `since_s`."""
        return sum(time_s > since_s for sample in self.samples for time_s in sample.times_s)

    def _waits(self, sample: Sample) -> list[tuple[float, float]]:
        last = () if sample.finish_reason is not None else (self.ended_s,)
        return list(pairwise((self.sent_s, *sample.times_s, *last)))


async def read_stream(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    stream: TokenStream,
    timeout_s: float,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> None:
    """Send a streamed completion or chat and fill `stream` from its events. Whatever goes wrong is its `error`."""
    stream.samples += [Sample() for _ in range(body.get("n", 1) - len(stream.samples))]
    stream.sent_s = time.monotonic()
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
    except (aiohttp.ClientError, OSError) as error:
        stream.is_cut = not stream.error
        stream.error = stream.error or f"{type(error).__name__}: {error}"
    except msgspec.DecodeError as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.ended_s = time.monotonic()
    if not stream.is_done and not stream.error:
        stream.is_cut = True
        stream.error = "the stream ended before [DONE]"


def _take(stream: TokenStream, data: bytes, on_tokens: Callable[[int], None]) -> None:
    if data == DONE:
        stream.is_done = True
        return
    event = msgspec.json.decode(data, type=dict[str, Any])
    if "error" in event:
        stream.error = str(event["error"])[:300]
    for choice in event.get("choices", []):
        sample = stream.samples[choice.get("index", 0)]
        ids = choice.get("token_ids") or []
        sample.ids += ids
        sample.logprobs += map(msgspec.json.encode, (choice.get("logprobs") or {}).get("content") or [])
        sample.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        sample.finish_reason = choice.get("finish_reason") or sample.finish_reason
        if ids or choice.get("finish_reason"):
            sample.times_s.append(time.monotonic())
        if ids:
            on_tokens(len(ids))


@dataclass(frozen=True)
class Difference:
    """Two streams beside each other: tokens one by one, and what comes with them."""

    checked: int = 0  # tokens of the undisturbed run
    lost: int = 0
    repeated: int = 0
    differing: int = 0
    logprobs: int = 0  # lost, repeated or differing
    texts: int = 0  # choices whose text or reason to end is another

    def __add__(self, other: Difference) -> Difference:
        return Difference(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def is_none(self) -> bool:
        """Whether everything was equal."""
        return self == Difference(self.checked)

    def __str__(self) -> str:
        text = f"of {self.checked} tokens {self.lost} lost, {self.repeated} repeated, {self.differing} differing"
        beside = ((self.logprobs, "logprobs differing"), (self.texts, "texts differing"))
        return text + "".join(f", {count} {what}" for count, what in beside if count)


def compare(got: Sequence[Hashable], expected: Sequence[Hashable]) -> Difference:
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


def compare_cut(got: TokenStream, expected: TokenStream) -> Difference:
    """Of a stream that was cut off, what came of it."""
    total = Difference()
    for one, other in zip_longest(got.samples, expected.samples, fillvalue=Sample()):
        beside = compare(one.logprobs, other.logprobs[: len(one.logprobs)])
        total += compare(one.ids, other.ids[: len(one.ids)])
        total += Difference(
            logprobs=beside.lost + beside.repeated + beside.differing,
            texts=int(not other.text.startswith(one.text)),
        )
    return total


def compare_streams(got: TokenStream, expected: TokenStream) -> Difference:
    """Every choice's tokens, logprobs, text and end."""
    total = Difference()
    for one, other in zip_longest(got.samples, expected.samples, fillvalue=Sample()):
        beside = compare(one.logprobs, other.logprobs)
        is_other = (one.text, one.finish_reason) != (other.text, other.finish_reason)
        total += compare(one.ids, other.ids)
        total += Difference(logprobs=beside.lost + beside.repeated + beside.differing, texts=int(is_other))
    return total
