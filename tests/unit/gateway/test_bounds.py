"""What bounds a caller beyond a request's fields: connections, bodies, templates, addresses; and what is told of us."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster import logs
from cluster.gateway import connection, limits
from cluster.gateway.auth import Keys, parse_keys
from cluster.gateway.limits import MAX_HELD_BYTES, MAX_JSON_VALUES
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served
from tests.unit.gateway.test_lifecycle import output

pytestmark = pytest.mark.anyio

KEY = "k" * 32
USER = {"authorization": f"Bearer {KEY}"}
INTERNALS = re.compile(
    r"\.py\b|Traceback|File \"|/tmp|/home|/work|/root|site-packages|\bcluster[./]|\bworkers[./]|unix:|ipv[46]:|grpc"
    r"|0x[0-9a-f]{6}|127\.0\.0\.1|localhost",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------------------- connections


async def test_over_the_bound_only_the_health_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_SURPLUS", 2)
    served = await serve(max_connections=2)
    await served.ready()
    idle = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
    for path, status in (("/health/live", 200), ("/health/ready", 200), ("/v1/models", 429), ("/", 429)):
        async with httpx.AsyncClient(base_url=served.base_url, timeout=DEADLINE_S) as client:
            response = await client.get(path)
        assert response.status_code == status
        if status == 429:
            assert response.json()["error"]["code"] == "overloaded"
            assert response.headers["retry-after"] == "1"
            assert response.headers["x-request-id"]
    idle += [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)  # is not even asked
    async with asyncio.timeout(DEADLINE_S):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "overloaded"
    for _, other in [*idle, (reader, writer)]:
        other.close()
        await other.wait_closed()
    async with asyncio.timeout(DEADLINE_S):
        while (await served.http.get("/v1/models")).status_code != 200:
            await served.http.aclose()
            served.http = httpx.AsyncClient(base_url=served.base_url, timeout=DEADLINE_S)
    await served.http.aclose()


async def test_refusals_are_quick_under_load(serve: Serve, worker: ScriptedWorker) -> None:
    """The bound is generous: the bench has the figure."""
    served = await serve(keys=Keys.of(parse_keys(KEY, "test"), None), max_open_requests=32)
    await served.ready()
    worker.gate.clear()
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 400, "stream": True}
    running = [asyncio.create_task(served.http.post("/v1/completions", json=body, headers=USER)) for _ in range(32)]
    await worker.wait_for_submits(32)
    took = []
    for headers, status in [({}, 401), (USER, 429)] * 10:
        began = time.perf_counter()
        assert (await served.http.post("/v1/completions", json=body, headers=headers)).status_code == status
        took.append(time.perf_counter() - began)
    worker.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 32
    assert sorted(took)[len(took) // 2] < 2.0


# -------------------------------------------------------------------------------------------------------- what is read


async def test_a_reader_that_stalls_leaves_nothing_on_the_worker(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(send_timeout_s=0.05, pool={"max_buffered": 8})
    await served.ready()
    worker.raw = lambda submit: [output(submit, i * 65536, "x" * 65536) for i in range(200)]
    content = json.dumps({"model": MODEL, "prompt": "Hi", "stream": True, "n": 2}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
    assert len(await worker.wait_for_aborts(2)) == 2
    admission: limits.Admission = served.app.state.gateway.admission
    assert await admission.wait_idle(DEADLINE_S)
    assert (worker.num_running, admission.held_bytes, admission.places) == (0, 0, [])
    writer.close()


async def test_a_template_of_a_request_is_never_rendered(served: Served, worker: ScriptedWorker) -> None:
    for extra in (
        {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template": ""},
        {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}},
        {"chat_template_kwargs": {"messages": [], "tools": []}},
    ):
        response = await served.chat(**extra)
        error = response.json()["error"]
        assert response.status_code == 400
        assert "chat_template" in f"{error['param']} {error['message']}"
        assert "49" not in response.text
    assert worker.submits == []


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


async def test_no_address_of_a_request_is_opened(
    served: Served, worker: ScriptedWorker, listening: socket.socket
) -> None:
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_id": url}},
        {"type": "text", "text": "Hi", "image_url": {"url": url}},
    ]
    for part in parts:
        response = await served.chat(messages=[{"role": "user", "content": [part]}])
        assert response.status_code == 400
        assert response.json()["error"]["code"] in ("unsupported_parameter", "invalid_value")
    with pytest.raises(BlockingIOError):  # nobody came
        listening.accept()
    assert worker.submits == []


# ------------------------------------------------------------------------------------------------------- what is told

NASTY = (
    "\r\nINFO forged",
    "\n{}",
    "\x1b[2Jcleared",
    "\x9b31m",
    "\x85next",
    "\u2028line",
    "\u2029part",
    "\u202eback",
    "\x00",
)


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_request_cannot_write_a_line_of_the_log(served: Served, log_format: Any) -> None:
    """Path, model, user, headers: a line for each request, and nothing in it that a terminal would obey."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", log_format, stream)
    try:
        for nasty in NASTY:
            quoted = "".join(f"%{byte:02x}" for byte in nasty.encode())
            await served.http.get(f"/v1/{quoted}")
            await served.http.get(f"/v1/models/{quoted}")
            await served.complete(model=nasty, user=nasty)
            await served.complete(user=nasty, stop=nasty, temperature=nasty)
            shown = nasty.encode()
            if not set(shown) & {0, 10, 13}:  # which are no part of a header
                await served.http.get("/health", headers={b"x-request-id": shown, b"user-agent": shown})
    finally:
        root.handlers[:], root.level = handlers, level
    text = stream.getvalue()
    num_requests = 4 * len(NASTY) + sum(not {"\n", "\0"} & set(nasty) for nasty in NASTY)
    lines = [line for line in text.splitlines() if "cluster.gateway.middleware" in line]
    assert len(lines) == len(text.splitlines()) == num_requests, text  # splitlines knows Unicode's too
    assert not any(
        ord(letter) < 32 or 127 <= ord(letter) < 160 or letter in "\u202e\u2028" for letter in "".join(lines)
    )
    if log_format == "json":
        assert all(json.loads(line)["logger"] == "cluster.gateway.middleware" for line in lines)


async def test_an_error_tells_nothing_of_our_insides(
    serve: Serve, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(request_timeout_s=5.0)
    await served.ready()
    posts: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": 5}),
        ("/v1/completions", {"prompt": "Hi", "model": "none"}),
        ("/v1/completions", {"prompt": "Hi", "what": 1}),
        ("/v1/completions", {"prompt": "x" * 600}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": {}}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"a": {}}}),
        ("/v1/nothing", {}),
        ("/login", {}),
    ]
    for path, body in posts:
        response = await served.http.post(path, json=body)
        assert not INTERNALS.search(response.text), response.text
    for content in (b"", b"{", b"\xff", b"[" * 1000):
        response = await served.http.post("/v1/completions", content=content)
        assert (response.status_code, INTERNALS.search(response.text)) == (400, None)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/root/secret.py")

    with monkeypatch.context() as patched:
        patched.setattr("cluster.gateway.service.make_submits", fail)
        response = await served.complete()
        assert (response.status_code, INTERNALS.search(response.text)) == (500, None)
        patched.setattr(served.app.state.gateway.engine_metrics, "update", fail)
        response = await served.http.get("/metrics")
        assert (response.status_code, INTERNALS.search(response.text)) == (500, None)
    await worker.kill()
    async with asyncio.timeout(DEADLINE_S):
        while (await served.http.get("/health/ready")).status_code != 503:
            pass
        while "reached" not in (unready := (await served.http.get("/health/ready")).text):
            pass
    assert not INTERNALS.search(unready)
    alone = await serve(request_timeout_s=0.05)
    for response in (await alone.complete(), await alone.http.get("/health/startup"), await alone.http.get("/cluster")):
        assert response.status_code in (200, 503, 504)
        assert not INTERNALS.search(response.text), response.text


async def test_a_body_of_too_many_values_is_not_parsed(served: Served, worker: ScriptedWorker) -> None:
    """It would hold many times its size, and the interpreter meanwhile."""
    many = b'{"prompt":"A","metadata":{"a":[' + b"[]," * MAX_JSON_VALUES + b"[]]}}"
    refused = await served.http.post("/v1/completions", content=many)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    # what there may be counts among what open requests hold, with what is made of it
    with served.app.state.gateway.admission.slot() as other:
        other.hold(MAX_HELD_BYTES - 4 * 2**20)
        fits = await served.complete(prompt=[72] * 1000, max_tokens=1, truncate_prompt_tokens=8)
        assert fits.status_code == 200, fits.text
        more = b'{"prompt":"A","metadata":{"a":[' + b"[]," * 50_000 + b"[]]}}"
        assert (await served.http.post("/v1/completions", content=more)).status_code == 429


async def test_an_object_of_very_many_fields_is_refused_at_once(served: Served) -> None:
    began = time.process_time()
    refused = await served.complete(**{f"unknown{number}": number for number in range(100_000)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert "more than 256 fields" in refused.json()["error"]["message"]
    assert time.process_time() - began < 2.0  # to gather all of them takes many times that
    assert gc.isenabled()
