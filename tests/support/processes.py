"""Whether a process that is not our child has ended."""

from __future__ import annotations

import os
import time
from pathlib import Path

POLL_S = 0.005


def has_ended(pid: int) -> bool:
    """Gone, or a zombie: an orphan waits for init, which may be slow to collect it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # no /proc here, or it went between the two lines
        return False


def wait_for_end(pid: int, timeout_s: float) -> None:
    """Raises `TimeoutError` naming the process."""
    deadline = time.monotonic() + timeout_s
    while not has_ended(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} still runs after {timeout_s:g} s")
        time.sleep(POLL_S)
