"""A process that ends with the one that started it, however that ended: its standard input is a pipe from there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading

STDIN = 0


def stop_with_stdin(stop: asyncio.Event) -> None:
    """Set `stop` when standard input ends, if it is a pipe; a pod's, or a terminal's, says nothing about a parent."""
    try:
        mode = os.fstat(STDIN).st_mode
    except OSError:
        return
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):  # asyncio's pipes are sockets on some systems
        return
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while os.read(STDIN, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop may have ended before
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
