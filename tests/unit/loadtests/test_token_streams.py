"""What a disturbed stream lost, repeated or changed; and how long it paused."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from loadtests.token_streams import Difference, TokenStream, compare, read_stream

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


def test_differences_add_up() -> None:
    assert Difference(8, 1, 2, 3) + Difference(4, 1, 0, 1) == Difference(12, 2, 2, 4)


def test_a_pause_counts_only_when_it_ended_after_the_kill() -> None:
    stream = TokenStream(times_s=[0.0, 5.0, 5.1, 6.1, 6.2])
    assert stream.pause_s(since_s=5.0) == pytest.approx(1.0)
    assert stream.pause_s(since_s=0.0) == pytest.approx(5.0)
    assert stream.pause_s(since_s=7.0) == 0.0


EVENT = b'data: {"choices":[{"text":"a","token_ids":[3,4],"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"text":"","token_ids":[5],"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
FAILED = b'data: {"error":{"message":"lost","code":"worker_lost"}}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "ids", "error"),
    [
        (200, EVENT + END, [3, 4, 5], ""),
        (200, EVENT, [3, 4], "before [DONE]"),
        (200, EVENT + FAILED, [3, 4], "worker_lost"),
        (503, b"busy", [], "HTTP 503: busy"),
    ],
)
def test_a_stream_is_read_with_its_error(status: int, body: bytes, ids: list[int], error: str) -> None:
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
            await read_stream(session, f"http://127.0.0.1:{port}/v1/completions", {}, stream, timeout_s=10.0)
        await runner.cleanup()
        return stream

    stream = asyncio.run(ask())
    assert stream.ids == ids
    assert error in stream.error
    assert bool(stream.error) == bool(error)
