"""Calls of another release are refused with words that say what to do; those of a tool are taken."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from cluster.protocol import CONTROL_METHOD, PROTOCOL_VERSION, SERVICE, STATE_METHOD, STREAM_METHOD, VERSION_KEY
from workers.auth import VersionCheck

BOUND_S = 20.0


async def _call(method: str, metadata: tuple[tuple[str, str], ...]) -> bytes:
    async def echo(body: bytes, _context: object) -> bytes:
        return body

    server = grpc.aio.server(interceptors=[VersionCheck("expert-0")])
    names = [name.rpartition("/")[2] for name in (STATE_METHOD, CONTROL_METHOD, STREAM_METHOD)]
    handlers = {name: grpc.unary_unary_rpc_method_handler(echo) for name in names}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer: bytes = await channel.unary_unary(method)(b"state", timeout=BOUND_S, metadata=metadata)
            return answer
    finally:
        await server.stop(None)


@pytest.mark.parametrize("metadata", [(), ((VERSION_KEY, str(PROTOCOL_VERSION)),)], ids=["a-tool", "same"])
def test_calls_of_this_release_are_taken(metadata: tuple[tuple[str, str], ...]) -> None:
    assert asyncio.run(_call(STATE_METHOD, metadata)) == b"state"


@pytest.mark.parametrize(
    ("method", "caller"),
    [(CONTROL_METHOD, "this controller"), (STREAM_METHOD, "this gateway"), (STATE_METHOD, "its caller")],
)
def test_another_release_is_told_both_versions(method: str, caller: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(_call(method, ((VERSION_KEY, "1"),)))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == (
        f"worker expert-0 speaks protocol version {PROTOCOL_VERSION}, {caller} 1: run all from one release"
    )
