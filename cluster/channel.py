"""Calls to workers: the options of their gRPC channels, what every call carries, and how its tasks end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc

from cluster.protocol import KEEPALIVE, PROTOCOL_VERSION, TOKEN_KEY, VERSION_KEY

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, whatever the last one met
    *KEEPALIVE,
)
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)  # asking again helps nobody
CANCEL_RETRY_S = 0.5  # grpc can lose a cancellation that meets the end of a call


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: the protocol version that we speak, and the cluster's token where there is one."""
    version = (VERSION_KEY, str(PROTOCOL_VERSION))
    return (version,) if token is None else (version, (TOKEN_KEY, f"Bearer {token}"))


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks that use a call until they have ended; what ended them is of no interest any more."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=CANCEL_RETRY_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # asked for, so that asyncio does not complain
