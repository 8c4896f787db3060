"""Signals that have taken effect when the call returns."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

BOUND_S = 10.0
POLL_S = 0.001


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; after SIGSTOP no thread of the process runs any more: one on another core does for a moment."""
    os.kill(pid, number)
    if number != signal.SIGSTOP or not Path("/proc/self/task").exists():
        return
    deadline = time.monotonic() + BOUND_S
    while not all(state == "T" for state in _states(pid)):
        assert time.monotonic() < deadline, f"process {pid} was not stopped"
        time.sleep(POLL_S)


def _states(pid: int) -> list[str]:
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return states
