"""A command that stays in the foreground while what it does lives in a process behind it.

Who ends the command may give it little time, or none: `ray job stop` signals all its descendants at once and kills
them after three seconds, a terminal goes away. The process behind is no descendant and has a session of its own. It
hears of each signal, and of the foreground's end, through a pipe, and ends in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from cluster.errors import ForetokenError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOST = 255  # the process behind was killed


def run_behind(work: Callable[[int], int]) -> int:
    """Run ``work(orders)`` behind this process and pass signals on; its exit code, or `LOST`.

    `orders` is a file descriptor: one byte for each signal, and its end when this process is gone. Must be called
    before there are threads.
    """
    orders, give_order = os.pipe()
    result, give_result = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes now is passed on below
    middle = os.fork()
    if middle == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.close(give_order)
        os.close(result)
        _work(work, orders, give_result)
    os.waitpid(middle, 0)
    os.close(orders)
    os.close(give_result)
    before = {number: signal.signal(number, lambda *_: _order(give_order)) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
    try:
        code = os.read(result, 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(give_order)
        os.close(result)
    return code[0] if code else LOST


def _order(give_order: int) -> None:
    try:
        os.write(give_order, b"!")
    except OSError:  # it has just ended
        return


def _work(work: Callable[[int], int], orders: int, give_result: int) -> NoReturn:
    """In the process behind."""
    code = 1
    try:
        code = work(orders)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except ForetokenError as error:
        print(f"Error: {error.message}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code, give_result)


def _leave(code: int, give_result: int) -> NoReturn:
    """End with that exit code, whoever is still there to hear of it."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        with contextlib.suppress(OSError):
            os.write(give_result, bytes([code & 0xFF]))
    finally:
        os._exit(code & 0xFF)
