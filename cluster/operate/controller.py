"""`foretoken cluster controller`: leads one cluster until it is told to end, or another controller leads."""

from __future__ import annotations

import asyncio
import logging
import os

from cluster import logs
from cluster.config import Settings
from cluster.control.controller import Controller
from cluster.control.launcher import Launcher
from cluster.control.leadership import LostLeadError
from cluster.control.model import find_model
from cluster.control.pod_launcher import PodLauncher
from cluster.control.ray_launcher import RayLauncher
from cluster.control.shape import describe
from cluster.errors import ConfigError, UnavailableError
from cluster.event_loop import loop_factory
from cluster.machine import this_machine
from cluster.serve import EXIT_AT_ONCE, on_signals
from cluster.store import open_store

logger = logging.getLogger(__name__)

EXIT_LOST_LEAD = 3


def run(settings: Settings, pods: bool = False) -> int:
    """Lead until SIGTERM or SIGINT, which ends the workers as well unless they are pods; returns the exit code.

    Raises `ForetokenError` for what stands in the way.
    """
    logs.configure(settings.log_level, settings.log_format)
    if settings.store is None:
        raise ConfigError(
            "a cluster's controller keeps its records in the store: set FORETOKEN_STORE, or `store` in the config "
            "file, to its url (redis://…)",
            param="store",
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_lead(settings, settings.store, pods))


async def _lead(settings: Settings, store_url: str, pods: bool) -> int:
    stop = asyncio.Event()
    on_signals(stop, lambda: os._exit(EXIT_AT_ONCE))
    store = open_store(store_url, namespace=settings.cluster_name)
    launcher: Launcher = PodLauncher(store) if pods else RayLauncher(settings)
    try:
        model = await asyncio.to_thread(find_model, settings)
        shape = await asyncio.to_thread(describe, model.path, await _device(settings, launcher))
        controller = Controller(
            settings, store=store, launcher=launcher, model=model, shape=shape, machine=this_machine()
        )
        await controller.run(stop)
    except LostLeadError as error:
        logger.error("this controller steps down: %s", error)
        return EXIT_LOST_LEAD
    finally:
        await launcher.close()
        await store.close()
    return 0


async def _device(settings: Settings, launcher: Launcher) -> str:
    """What kind of device the workers will be on: weights may be larger on one than on another."""
    if settings.device != "auto":
        return settings.device
    try:
        nodes = (await launcher.topology()).nodes
    except UnavailableError:
        return "auto"
    kinds = {device.kind for node in nodes for device in node.compute_devices}
    return "cuda" if "cuda" in kinds else "cpu" if kinds else "auto"
