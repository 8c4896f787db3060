"""Whether a worker hangs: its event loop answers `State` whatever its engine does, and a load beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from cluster.channel import CHANNEL_OPTIONS, call_metadata
from cluster.control.launch import WorkerProcess
from cluster.protocol import STATE_METHOD

logger = logging.getLogger(__name__)

LOOKS = 20  # at the worker within `patience_s`


async def end_hung(worker: WorkerProcess, token: str | None, patience_s: float) -> None:
    """Kill the worker's process whenever it does not answer for `patience_s` after its start; `watch` starts it anew.

    Runs until cancelled.
    """
    metadata = call_metadata(token)

    async def ask() -> bool:
        try:
            async with grpc.aio.insecure_channel(worker.launch.address, options=CHANNEL_OPTIONS) as channel:
                await channel.unary_unary(STATE_METHOD)(b"", timeout=patience_s, metadata=metadata)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return False
        return True

    def kill() -> None:
        logger.error(
            "the worker, process %d, has not answered for %g s: it hangs, and is killed", worker.pid, patience_s
        )
        worker.kill()

    await watch_pulse(lambda: worker.pid if worker.is_ready else None, ask, kill, patience_s)


async def watch_pulse(
    pid: Callable[[], int | None], ask: Callable[[], Awaitable[bool]], kill: Callable[[], None], patience_s: float
) -> None:
    """`ask` the process that `pid` names, again and again, and `kill` it once it was silent for `patience_s`.

    A question may take all that time: an answer that comes late is one. Time in which this process did not run does not
    count, since the other may not have run either.
    """
    clock, pause_s = asyncio.get_running_loop().time, patience_s / LOOKS
    asked: int | None = None
    silent_s = 0.0
    answer: asyncio.Future[bool] | None = None
    try:
        while True:
            before = clock()
            if (now := pid()) != asked and answer is not None:
                answer.cancel()
                answer = None
            if now != asked:
                asked, silent_s = now, 0.0
            if asked is not None and answer is None:
                answer = asyncio.ensure_future(ask())
            await asyncio.sleep(pause_s)
            silent_s += min(clock() - before, 2 * pause_s)
            if answer is not None and answer.done():
                if answer.result():
                    silent_s = 0.0
                answer = None
            if asked is not None and asked == pid() and silent_s >= patience_s:
                kill()
                silent_s = 0.0
    finally:
        if answer is not None:
            answer.cancel()
