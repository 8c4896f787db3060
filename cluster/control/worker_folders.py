"""Where workers' files lie on a machine: logs, compiled kernels, sockets."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.config import Settings

MAX_SOCKET_PARENT = 70  # a socket's whole path may have 103 bytes on macOS, 107 on Linux


def cluster_folder(settings: Settings) -> Path:
    """Where what belongs to a cluster lies on this machine."""
    return settings.home / "clusters" / settings.cluster_name


def logs_folder(settings: Settings) -> Path:
    """Where the processes of a cluster log on this machine."""
    return cluster_folder(settings) / "logs"


def kernels_dir(settings: Settings) -> Path:
    """Where compiled kernels are kept."""
    return settings.home / "kernels"


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder that only this user can open, for workers' sockets; removed with what is in it."""
    parent = tempfile.gettempdir()
    if len(parent) > MAX_SOCKET_PARENT:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="foretoken-", dir=parent) as name:  # made with mode 0700
        yield Path(name)
