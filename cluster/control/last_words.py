"""What a process said before it ended: the end of what it printed, or its own word on why it cannot start."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from cluster.errors import ConfigError, StartImpossibleError, StartRefusedError

TAIL_BYTES = 4096
TAIL_LINES = 8
IMPOSSIBLE = f"{ConfigError.code}: "  # how such a word begins where trying again does not help
LAST_WORD = re.compile(rb"^error: (.*)", re.MULTILINE | re.DOTALL)


def last_word(printed: bytes | bytearray) -> str | None:
    """Why it cannot start, where it says so itself: after ``error: `` at the beginning of a line."""
    found = LAST_WORD.search(printed)
    return None if found is None else found[1].decode("utf-8", errors="replace").strip()


def refusal(printed: bytes | bytearray) -> StartRefusedError | None:
    """A worker's last word as an error; None where it has said none."""
    said = last_word(printed)
    if said is None:
        return None
    if said.startswith(IMPOSSIBLE):
        return StartImpossibleError(said.removeprefix(IMPOSSIBLE))
    return StartRefusedError(said)


def last_lines(printed: bytes | bytearray) -> str:
    """The last lines that are not empty; what overwrote itself with carriage returns counts as lines."""
    lines = printed.decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])


def tail(log_path: Path, num_bytes: int = TAIL_BYTES, start: int = 0) -> bytes:
    """The end of a log from its byte `start` on; nothing where it cannot be read."""
    with contextlib.suppress(OSError), log_path.open("rb") as log:
        log.seek(max(start, os.fstat(log.fileno()).st_size - num_bytes))
        return log.read()
    return b""
