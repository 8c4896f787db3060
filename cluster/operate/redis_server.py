"""The Redis that `cluster up` starts where no store is given: on a Unix socket in the cluster's own folder, no port."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from pydantic import SecretStr

from cluster.control.worker_folders import MAX_SOCKET_PARENT
from cluster.errors import ConfigError
from cluster.operate.children import Child

PROGRAM = "redis-server"
SOCKET = "redis.sock"
PROBE_TIMEOUT_S = 1.0
OPTIONS = """
port 0
unixsocket {socket}
unixsocketperm 600
requirepass {password}
dir {folder}
save ""
appendonly yes
appendfsync everysec
daemonize no
maxmemory-policy noeviction
"""


def redis_child(
    folder: Path, password: SecretStr, log_path: Path, environment: Mapping[str, str]
) -> tuple[Child, SecretStr]:
    """The server, not started yet, and the url of the store in it. It gets its password through its input.

    What was written outlives the server's process, and not `folder`. Raises `ConfigError` where there is none here.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise ConfigError(
            f"{PROGRAM} is not installed: install it (Debian, Ubuntu: sudo apt-get install redis-server; Fedora: sudo "
            "dnf install redis), or name a Redis that runs in FORETOKEN_STORE or the config file: store: "
            "redis://[user:password@]host:port/database",
            param="store",
        )
    assert len(str(folder)) <= MAX_SOCKET_PARENT
    path = folder / SOCKET
    data = folder / "redis"
    data.mkdir(exist_ok=True)
    secret = password.get_secret_value()
    config = OPTIONS.format(socket=path, password=secret, folder=data)
    child = Child("redis", (program, "-"), environment, log_path, stdin=config.encode())
    child.is_answering = lambda timeout_s: asyncio.to_thread(is_answering, folder, timeout_s)
    return child, SecretStr(f"unix://:{quote(secret, safe='')}@{path}?db=0")


def is_answering(folder: Path, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether the server takes commands: it refuses ours, which has no password. Blocks."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(folder / SOCKET))
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"-NOAUTH")
    return False
