"""What a `RayLauncher` and its bridge say to each other, as JSON lines: `Connect`, then `Call`s; `Reply`s come back."""

from __future__ import annotations

from typing import Literal

import msgspec

from cluster.environment import PACKAGES
from cluster.protocol import Message

CALL_TIMEOUT_S = 20.0  # for one answer, besides a worker's own start


class Target(Message, frozen=True):
    """A worker's process, or the one to be."""

    name: str
    node_id: str
    pid: int = 0
    memory_bytes: int = 0
    device_id: str = "cpu"


class Connect(Message, frozen=True, tag="connect"):
    """The bridge's first line: where Ray is, and what every worker needs."""

    cluster_name: str
    address: str | None  # None: as RAY_ADDRESS says, or the Ray that runs on this machine
    host: str | None  # that workers listen on; None: their node's own address
    logs_dir: str
    start_timeout_s: float
    command: tuple[str, ...]
    packages: str = str(PACKAGES)  # our code on this machine

    @property
    def namespace(self) -> str:
        """In Ray, of the actors of every cluster of that name."""
        return f"foretoken-{self.cluster_name}"


class Call(Message, frozen=True):
    """One question; several may be open."""

    id: int
    method: Literal["nodes", "check_alone", "start", "adopt", "is_running", "stop", "end_all"]
    cluster_id: str = ""  # whose actors are asked, ended, or made
    target: Target | None = None
    launch: str | None = None  # a `Launch` as JSON
    kill: bool = False
    timeout_s: float = CALL_TIMEOUT_S


class RayNode(Message, frozen=True):
    """A node as Ray knows it."""

    name: str
    machine: str  # its address: nodes with one address share a machine
    num_cores: int
    memory_bytes: int
    gpu_bytes: tuple[int, ...] = ()  # of each GPU, by index


class Reply(Message, frozen=True):
    """The answer to the call of that id; id 0: whether the connection stands."""

    id: int
    result: msgspec.Raw = msgspec.Raw(b"null")
    error_code: str | None = None  # of `cluster.errors`
    error_message: str = ""
