"""Connections that end early, and what is no HTTP: each has its error, and disturbs nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from typing import Any

import pytest

from cluster.gateway import connection
from cluster.protocol import RequestOutput, Submit
from tests.support.eventually import eventually
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

BODY = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


def request(**body: Any) -> bytes:
    content = json.dumps({"model": MODEL, "prompt": "Hi"} | body).encode()
    return HEAD % len(content) + content


def one_token(submit: Submit) -> list[RequestOutput]:
    return [RequestOutput(request_id=submit.request_id, index=0, token_ids=[72], text="H")]


async def send(port: int, data: bytes, *, half_close: bool = False) -> bytes:
    """All that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    finally:
        writer.close()


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape, which is one answer and no more."""
    found, headers, body = parsed(answer)
    assert (found, headers["content-type"]) == (status, "application/json"), answer
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert len(body) == int(headers["content-length"])
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


async def still_serves(served: Served) -> None:
    assert (await served.complete(max_tokens=1)).status_code == 200
    assert await served.app.state.gateway.admission.wait_idle(DEADLINE_S)


# ------------------------------------------------------------------------------------------------- half-closed sockets


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_behind_a_half_closed_connection_is_given_up_and_says_so(
    served: Served, worker: ScriptedWorker, stream: bool
) -> None:
    worker.gate.clear()
    error = error_of(await send(served.port, request(stream=stream), half_close=True), 400)
    assert error["code"] == "client_disconnected"
    assert "sending side" in error["message"]
    assert await served.app.state.gateway.admission.wait_idle(DEADLINE_S)
    for submit in worker.submits:  # it may have ended before it was submitted
        assert submit.request_id in await worker.wait_for_aborts()
    worker.gate.set()
    await still_serves(served)


async def test_a_half_closed_connection_in_the_queue(
    served: Served, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    worker.gate.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request())
    [submit] = await worker.wait_for_submits()
    writer.write_eof()
    assert await worker.wait_for_aborts() == [submit.request_id]
    async with asyncio.timeout(DEADLINE_S):
        assert error_of(await reader.read(), 400)["code"] == "client_disconnected"
    writer.close()
    assert caplog.text == ""


async def test_a_stream_that_has_begun_ends_with_an_error_event(
    served: Served, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    worker.raw = one_token
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request(stream=True))
    async with asyncio.timeout(DEADLINE_S):
        await reader.readuntil(b'"text":"H"')
        writer.write_eof()
        rest = await reader.read()
    writer.close()
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]
    assert rest.endswith(b"\r\n0\r\n\r\n"), "a chunked body that is whole"
    events = re.findall(rb"^data: (.*)$", rest, re.MULTILINE)
    assert [json.loads(event)["error"]["code"] for event in events] == ["client_disconnected"]
    assert caplog.text == ""
    worker.raw = None
    await still_serves(served)


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_a_body_that_ends_early(served: Served, worker: ScriptedWorker, framing: str) -> None:
    part = HEAD % len(BODY) + BODY[:-5]
    if framing == "chunked":
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        part = head + b"%x\r\n%b\r\n" % (len(BODY), BODY)  # without the last chunk
    error = error_of(await send(served.port, part, half_close=True), 400)
    assert "before the whole body" in error["message"]
    assert worker.submits == []
    await still_serves(served)


@pytest.mark.parametrize("part", [b"P", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le"])
async def test_a_head_that_ends_early(served: Served, part: bytes) -> None:
    assert "within the request's head" in error_of(await send(served.port, part, half_close=True), 400)["message"]
    await still_serves(served)


async def test_a_connection_that_ends_between_requests_is_closed_without_a_word(served: Served) -> None:
    assert await send(served.port, b"", half_close=True) == b""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request(max_tokens=1))
    async with asyncio.timeout(DEADLINE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(parsed(head)[1]["content-length"])
        await reader.readexactly(length)
        writer.write_eof()
        assert await reader.read() == b""
    writer.close()


async def test_what_needs_no_worker_is_answered_all_the_same(served: Served) -> None:
    answer = await send(served.port, b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n", half_close=True)
    assert parsed(answer)[0] == 200


async def test_a_client_that_leaves_with_a_request_sent_ahead(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request() + request())
    [submit] = await worker.wait_for_submits()
    writer.close()
    assert await worker.wait_for_aborts() == [submit.request_id]
    worker.gate.set()
    await still_serves(served)


# ----------------------------------------------------------------------------------------------------- what is no HTTP


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        CHUNKED + b"zz\r\n{}\r\n",
        CHUNKED + b"2\r\n{}        ",
    ],
    ids=["garbage", "tls", "no-host", "negative-length", "chunk-size", "chunk-end"],
)
async def test_what_is_no_http_has_an_error_in_the_same_shape(
    served: Served, worker: ScriptedWorker, data: bytes
) -> None:
    error = error_of(await send(served.port, data), 400)
    assert error["message"].startswith("this is no HTTP/1.1 request: ")
    assert worker.submits == []
    await still_serves(served)


async def test_a_head_that_is_too_large(served: Served) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-filler: y\r\n" * 60_000
    error = error_of(await send(served.port, head), 431)
    assert str(connection.MAX_HEAD_BYTES) in error["message"]
    await still_serves(served)


@pytest.mark.parametrize("part", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come(serve: Serve, monkeypatch: pytest.MonkeyPatch, part: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    served = await serve()
    answer = await send(served.port, part)
    if part:
        assert "0.05 s" in error_of(answer, 408)["message"]
    else:
        assert answer == b""


async def test_a_later_head_that_does_not_come(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    served = await serve()
    await served.ready()
    answer = await send(served.port, request(max_tokens=1) + b"GET /health HTTP/1.1\r\n")
    first, second = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    error_of(b"HTTP/1.1 " + second, 408)


async def test_the_head_may_take_less_than_the_request(
    serve: Serve, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    served = await serve()
    await served.ready()
    worker.gate.clear()
    answer = asyncio.create_task(served.complete())
    await worker.wait_for_submits()
    assert await send(served.port, b"") == b"", "a connection that began later has timed out by now"
    worker.gate.set()
    assert (await answer).status_code == 200


async def test_a_refused_client_that_does_not_close_is_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GARBAGE\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        error_of(await reader.read(), 400)
        with contextlib.suppress(OSError):  # a reset or a broken pipe
            while True:
                writer.write(b"more")
                await writer.drain()
    writer.close()


@pytest.mark.parametrize("path", ["/" + "a" * 30_000, "/v1/models/" + "a" * 30_000])
async def test_a_long_path_is_shown_in_part(served: Served, caplog: pytest.LogCaptureFixture, path: str) -> None:
    caplog.set_level(logging.INFO)
    response = await served.http.get(path)
    assert response.status_code == 404
    assert len(response.content) < 500
    assert "a" * 100 in response.json()["error"]["message"]
    assert max(len(record.getMessage()) for record in caplog.records if record.name.startswith("cluster")) < 400


async def test_a_client_that_takes_nothing_of_its_answer_is_cut(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(connection, "TAKE_S", 0.3)
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(
            b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 200
        )  # far more than the system's buffers hold
        await eventually(lambda: "took nothing of its answer" in caplog.text, "the log")
    # and one that takes its answer, however slowly, has all of it
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        assert json.loads(parsed(await reader.read())[2])["openapi"] == "3.1.0"
    writer.close()
