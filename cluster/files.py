"""Small files that several processes read: written whole, and locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PRIVATE = 0o600
POLL_S = 0.05


class LockedError(Exception):
    """Another process holds the lock."""


def write_whole(path: Path, data: bytes) -> None:
    """Whoever reads `path`, its user alone, finds all that one writer wrote, however many write. Raises `OSError`."""
    file, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # one of our own, with mode `PRIVATE`
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock at `path`, a file that stays; blocks until it is free.

    Raises `LockedError` where it is not after `timeout_s`, and `OSError` where it cannot be written.
    """
    lock = os.open(path, os.O_WRONLY | os.O_CREAT, PRIVATE)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(lock):
            if time.monotonic() >= deadline:
                raise LockedError
            time.sleep(POLL_S)
        yield
    finally:
        os.close(lock)


def is_locked(path: Path) -> bool:
    """Whether a process, this one included, holds the lock at `path`."""
    try:
        lock = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        return not _try_lock(lock)
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
