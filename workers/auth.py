"""The token of a cluster: what every call to a worker must carry, and what calls to another worker carry."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from cluster.protocol import TOKEN_KEY


def credentials(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call to a worker of this cluster."""
    return () if token is None else ((TOKEN_KEY, f"Bearer {token}"),)


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
