"""What a disturbed stream lost, repeated or changed; and how long it paused."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from loadtests.token_streams import Difference, Sample, TokenStream, compare, compare_cut, compare_streams, read_stream

EXPECTED = [5, 7, 7, 1, 9, 3, 3, 8]


@pytest.mark.parametrize(
    ("got", "difference"),
    [
        (EXPECTED, Difference(8)),
        (EXPECTED[:5], Difference(8, lost=3)),
        ([5, 7, 7, 9, 3, 3, 8], Difference(8, lost=1)),
        ([5, 7, 7, 1, 7, 1, 9, 3, 3, 8], Difference(8, repeated=2)),
        ([5, 7, 7, 1, 9, 4, 3, 8], Difference(8, differing=1)),
        ([], Difference(8, lost=8)),
    ],
)
def test_differences_are_counted_token_by_token(got: list[int], difference: Difference) -> None:
    assert compare(got, EXPECTED) == difference
    assert difference.is_none == (got == EXPECTED)


def test_differences_add_up() -> None:
    assert Difference(8, 1, 2, 3, 4, 5) + Difference(4, 1, 0, 1, 0, 1) == Difference(12, 2, 2, 4, 4, 6)


def _stream(*samples: Sample) -> TokenStream:
    return TokenStream(samples=list(samples))


def _sample(ids: list[int], text: str = "a b", reason: str = "length", logprobs: tuple[bytes, ...] = ()) -> Sample:
    return Sample(ids, list(logprobs), text=text, finish_reason=reason)


@pytest.mark.parametrize(
    ("got", "difference"),
    [
        (_stream(_sample([1, 2]), _sample([3])), Difference(3)),
        (_stream(_sample([1, 2]), _sample([4])), Difference(3, differing=1)),
        (_stream(_sample([1, 2])), Difference(3, lost=1, texts=1)),
        (_stream(_sample([1, 2], text="a"), _sample([3])), Difference(3, texts=1)),
        (_stream(_sample([1, 2]), _sample([3], reason="stop")), Difference(3, texts=1)),
    ],
)
def test_every_choice_and_its_text_and_end_are_compared(got: TokenStream, difference: Difference) -> None:
    assert compare_streams(got, _stream(_sample([1, 2]), _sample([3]))) == difference


@pytest.mark.parametrize(
    ("ids", "text", "logprobs", "difference"),
    [
        ([1, 2], "a ", (b"-1",), Difference(2)),
        ([], "", (), Difference(0)),
        ([1, 4], "a ", (b"-1",), Difference(2, differing=1)),
        ([1, 1, 2], "a ", (), Difference(3, lost=1, repeated=1)),
        ([1, 2], "b", (b"-2",), Difference(2, logprobs=1, texts=1)),
        ([1, 2, 3, 9], "a b", (), Difference(3, repeated=1)),
    ],
)
def test_of_a_stream_that_was_cut_off_what_came_is_compared(
    ids: list[int], text: str, logprobs: tuple[bytes, ...], difference: Difference
) -> None:
    expected = _stream(_sample([1, 2, 3], logprobs=(b"-1", b"-2", b"-3")), _sample([4]))
    assert compare_cut(_stream(_sample(ids, text, logprobs=logprobs)), expected) == difference


def test_logprobs_are_compared_one_by_one() -> None:
    expected = _stream(_sample([1, 2, 3], logprobs=(b"-1", b"-2", b"-3")))
    assert compare_streams(expected, expected).is_none
    other = _stream(_sample([1, 2, 3], logprobs=(b"-1", b"-2.5")))
    assert compare_streams(other, expected) == Difference(3, logprobs=2)


@pytest.mark.parametrize(
    ("since_s", "pause_s"),
    [(0.0, 5.0), (5.9, 1.0), (6.95, 0.2), (7.5, 0.0)],
)
def test_a_pause_counts_only_when_it_ended_after_the_kill(since_s: float, pause_s: float) -> None:
    sample = Sample(times_s=[1.0, 5.9, 6.9, 7.1], finish_reason="length")
    stream = TokenStream(samples=[Sample(times_s=[5.0], finish_reason="stop"), sample], sent_s=0.0, ended_s=99.0)
    assert stream.pause_s(since_s) == pytest.approx(pause_s)


def test_a_wait_for_the_first_token_is_a_pause() -> None:
    stream = TokenStream(samples=[Sample(times_s=[13.0, 13.1], finish_reason="length")], sent_s=10.0, ended_s=13.2)
    assert stream.pause_s(since_s=10.5) == pytest.approx(3.0)


def test_a_wait_for_what_never_came_is_a_pause() -> None:
    stream = TokenStream(samples=[Sample(times_s=[11.0])], sent_s=10.0, ended_s=41.0, error="lost")
    assert stream.pause_s(since_s=10.5) == pytest.approx(30.0)
    assert TokenStream(sent_s=10.0, ended_s=15.0, error="HTTP 503").pause_s(since_s=12.0) == pytest.approx(5.0)


EVENT = b'data: {"choices":[{"text":"a","token_ids":[3,4],"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"text":"","token_ids":[5],"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
FAILED = b'data: {"error":{"message":"lost","code":"worker_lost"}}\n\n'
CHAT = (
    b'data: {"choices":[{"index":1,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    b'data: {"choices":[{"index":1,"delta":{"content":"x"},"logprobs":{"content":[{"p":-1}]},"token_ids":[8]}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"y"},"logprobs":null,"token_ids":[9]}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


def _read(body: bytes, status: int = 200, **asked: Any) -> TokenStream:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async def ask() -> TokenStream:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        stream = TokenStream()
        async with aiohttp.ClientSession() as session:
            await read_stream(session, f"http://127.0.0.1:{port}/v1/completions", asked, stream, timeout_s=10.0)
        await runner.cleanup()
        return stream

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("status", "body", "ids", "error", "is_cut"),
    [
        (200, EVENT + END, [3, 4, 5], "", False),
        (200, EVENT, [3, 4], "before [DONE]", True),
        (200, EVENT + FAILED, [3, 4], "worker_lost", False),
        (503, b"busy", [], "HTTP 503: busy", False),
    ],
)
def test_a_stream_is_read_with_its_error(status: int, body: bytes, ids: list[int], error: str, is_cut: bool) -> None:
    stream = _read(body, status)
    assert stream.ids == ids
    assert error in stream.error
    assert bool(stream.error) == bool(error)
    assert stream.is_cut == is_cut
    assert stream.sent_s < stream.ended_s


def test_choices_are_read_apart_and_a_role_is_no_event() -> None:
    first, second = _read(CHAT, n=2).samples
    assert (first.ids, first.text, first.finish_reason, len(first.times_s)) == ([9], "y", "stop", 2)
    assert (second.ids, second.text, second.finish_reason, len(second.times_s)) == ([8], "x", None, 1)
    assert (first.logprobs, second.logprobs) == ([], [b'{"p":-1}'])
