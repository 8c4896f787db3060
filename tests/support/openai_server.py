"""A server that speaks just enough of the OpenAI API to be put under load; also runs as a program with `--port`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Reply:
    """How one request is answered; `num_tokens` None: as many as were asked for."""

    status: int = 200
    num_tokens: int | None = None
    error: str = ""  # instead of the end of the stream
    cut: bool = False  # close without [DONE]
    hang: bool = False  # send the head, then nothing until the server stops
    usage: bool = True


@dataclass
class OpenAIServer:
    """`answer` decides each reply. With `barrier` n, nobody is answered before n requests are there."""

    answer: Callable[[dict[str, Any]], Reply] = lambda body: Reply()
    barrier: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_tokens: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, ready: Callable[[], None]) -> None:
        self._all_there, self._stop = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        ready()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._request(head[0].split()[1], headers, body, writer):
                    break
        writer.close()

    async def _request(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/models":
            _whole(writer, 200, json.dumps({"object": "list", "data": [{"id": "fake"}]}))
        elif path == "/metrics":
            _whole(writer, 200, self._metrics())
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self.headers.append(headers)
            return await self._generate(path, json.loads(body), writer)
        else:
            _whole(writer, 404, "{}")
        await writer.drain()
        return True

    def _metrics(self) -> str:
        """Each token is one step of a sequence: 3 ms inside the model, 20 us outside."""
        n = self.num_tokens
        values = {"step_seconds": n * 0.00302, "forward_seconds": n * 0.003, "sequence_steps": n}
        lines = [f'foretoken:engine_{name}_total{{model_name="fake"}} {value}' for name, value in values.items()]
        return "\n".join(["# HELP x", *lines, ""])

    async def _generate(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        self.bodies.append(body)
        reply = self.answer(body)
        if len(self.bodies) >= self.barrier:
            self._all_there.set()
        await self._all_there.wait()
        if reply.status != 200:
            _whole(writer, reply.status, json.dumps({"error": {"message": reply.error}}))
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if reply.hang:
            await self._stop.wait()
            return False
        chat = path.endswith("chat/completions")
        if chat:
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        num = body["max_tokens"] if reply.num_tokens is None else reply.num_tokens
        for index in range(num):
            part = {"delta": {"content": " a"}} if chat else {"text": " a"}
            _event(writer, {"choices": [{**part, "finish_reason": "length" if index == num - 1 else None}]})
            await writer.drain()
        self.num_tokens += num
        if reply.error:
            _event(writer, {"error": {"message": reply.error}})
        if reply.error or reply.cut:
            return False
        if reply.usage:
            usage = {"prompt_tokens": len(body.get("prompt", ())), "completion_tokens": num}
            _event(writer, {"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _whole(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    body = text.encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")


@contextlib.contextmanager
def running(server: OpenAIServer | None = None) -> Iterator[OpenAIServer]:
    """The server on a thread of its own, until the block ends."""
    server = server or OpenAIServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    def run() -> None:
        loop.run_until_complete(server.serve(ready.set))
        loop.run_until_complete(_finish())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield server
    finally:
        loop.call_soon_threadsafe(server._stop.set)
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


async def _finish() -> None:
    """End the connections that are still open."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    asyncio.run(OpenAIServer(port=port).serve(lambda: None))
