"""A way to a server that can fall silent: the connections stay open, nothing gets through any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

CHUNK_BYTES = 1 << 16


class SilentProxy:
    """Passes bytes on between `address` and `host`:`port`, until `is_silent`: then it drops all that comes."""

    def __init__(self, host: str, port: int) -> None:
        self.is_silent = False
        self.address = ""
        self._server_at = (host, port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._server_at)
        self._writers += [writer, there_writer]
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pass_on(source, sink)))

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await source.read(CHUNK_BYTES):
                if not self.is_silent:
                    sink.write(chunk)
                    await sink.drain()
        if not self.is_silent:
            sink.close()


@contextlib.asynccontextmanager
async def silent_proxy(address: str) -> AsyncIterator[SilentProxy]:
    """A proxy to the server at `address` ("host:port")."""
    host, _, port = address.rpartition(":")
    proxy = SilentProxy(host, int(port))
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
