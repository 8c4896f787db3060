"""Whose calls a worker takes: those with the cluster's token, of its own protocol version."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from cluster.protocol import CONTROL_METHOD, LINK_METHOD, PROTOCOL_VERSION, STREAM_METHOD, TOKEN_KEY, VERSION_KEY

CALLERS = {CONTROL_METHOD: "this controller", STREAM_METHOD: "this gateway", LINK_METHOD: "the worker that asks"}


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses a call without the token as UNAUTHENTICATED, whatever its method, before any of its messages is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # A handler of streams serves every kind of method: it may answer before the caller has sent anything.
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        given: str | bytes = dict(call.invocation_metadata).get(TOKEN_KEY, "")
        body = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(body, self._expected):
            return await continuation(call)
        return self._refusal


async def _refuse(_messages: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the call carries no valid token in {TOKEN_KEY!r}")


class VersionCheck(grpc.aio.ServerInterceptor):
    """Refuses a call of another protocol version as FAILED_PRECONDITION, before any of its messages is read.

    A call that names no version is a tool's, and taken.
    """

    def __init__(self, name: str) -> None:
        """`name`: this worker's, for people."""
        self._name = name

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        ours, theirs = str(PROTOCOL_VERSION), dict(call.invocation_metadata).get(VERSION_KEY)
        if theirs is None or theirs == ours:
            return await continuation(call)
        caller = CALLERS.get(call.method, "its caller")
        text = f"worker {self._name} speaks protocol version {ours}, {caller} {theirs}: run all from one release"

        async def refuse(_messages: object, context: Any) -> None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)

        return grpc.stream_stream_rpc_method_handler(refuse)
