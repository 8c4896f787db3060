"""How this side of a connection calls workers: the options of its gRPC channels, and what every call carries."""

from __future__ import annotations

from cluster.protocol import KEEPALIVE, PROTOCOL_VERSION, TOKEN_KEY, VERSION_KEY

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, whatever the last one met
    *KEEPALIVE,
)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: the protocol version that we speak, and the cluster's token where there is one."""
    version = (VERSION_KEY, str(PROTOCOL_VERSION))
    return (version,) if token is None else (version, (TOKEN_KEY, f"Bearer {token}"))
