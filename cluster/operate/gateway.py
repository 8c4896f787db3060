"""`foretoken cluster gateway`: the front door of a cluster, one process of it.

It knows the workers from the store. It ends, after what runs, on SIGTERM or SIGINT, and where its standard input is a
pipe also with that: whoever held the other end is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

from cluster import logs
from cluster.config import Settings
from cluster.control.model import Model, find_model
from cluster.errors import ConfigError, DeadlineError
from cluster.event_loop import loop_factory
from cluster.gateway.discovery import WorkerDiscovery
from cluster.gateway.pool import WorkerPool
from cluster.gateway.status import StoreStatus
from cluster.operate.parent import stop_with_stdin
from cluster.serve import EXIT_AT_ONCE, announce, base_url, listen, on_signals, serve_http, with_keys
from cluster.store import open_store
from cluster.store.base import Store

logger = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. Raises `ForetokenError` for what stands in the way."""
    logs.configure(settings.log_level, settings.log_format)
    started = time.monotonic()
    if settings.store is None:
        raise ConfigError(
            "a cluster's gateway finds its workers in the store: set FORETOKEN_STORE, or `store` in the config file, "
            "to its url (redis://…)",
            param="store",
        )
    with listen(settings.host, settings.port) as listener:
        store = open_store(settings.store.get_secret_value(), namespace=settings.cluster_name)
        settings = with_keys(settings, listener)
        model = find_model(settings)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(settings, model, store, listener, started))
    return 0


async def serve(settings: Settings, model: Model, store: Store, listener: socket.socket, started: float) -> None:
    """Run the gateway until the first signal, then let what runs finish."""
    stop = asyncio.Event()
    on_signals(stop, lambda: os._exit(EXIT_AT_ONCE))
    stop_with_stdin(stop)
    token = None if settings.token is None else settings.token.get_secret_value()
    pool = WorkerPool(token=token, lease_s=settings.lease_s)
    url = base_url(listener)
    logger.info("listening on %s for the cluster %s", url, settings.cluster_name)
    discovery = asyncio.create_task(WorkerDiscovery(store, pool).run())
    greeting = asyncio.create_task(_announce(settings, pool, url, started))
    try:
        await serve_http(settings, model, pool, StoreStatus(store), listener, stop, discovery)
    finally:
        for task in (discovery, greeting):
            task.cancel()
        await asyncio.gather(discovery, greeting, return_exceptions=True)
        await store.close()


async def _announce(settings: Settings, pool: WorkerPool, url: str, started: float) -> None:
    """Say that requests can come, once a worker is there."""
    while True:
        try:
            hello = await pool.ready(settings.start_timeout_s)
        except DeadlineError as error:
            logger.warning("%s", error.message)
        else:
            announce(hello, url, settings, time.monotonic() - started)
            return
