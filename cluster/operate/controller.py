"""`foretoken cluster controller`: leads one cluster until it is told to end, or another controller leads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from pydantic import SecretStr

from cluster import logs, silence
from cluster.config import Settings
from cluster.control.controller import Controller
from cluster.control.last_known import LastKnown, open_last_known
from cluster.control.launcher import Launcher
from cluster.control.leadership import LostLeadError
from cluster.control.model import find_model
from cluster.control.pod_launcher import PodLauncher
from cluster.control.ray_launcher import RayLauncher
from cluster.control.shape import describe
from cluster.control.topology import Node
from cluster.errors import ConfigError, UnavailableError
from cluster.event_loop import loop_factory
from cluster.machine import this_machine
from cluster.operate.parent import stop_with_stdin
from cluster.operate.pulse import Pulse
from cluster.serve import EXIT_AT_ONCE, on_signals
from cluster.store import open_store

logger = logging.getLogger(__name__)

EXIT_LOST_LEAD = 3
PULSE_NAME = "controller.pulse"
NODES_TIMEOUT_S = 10.0


def hung_after_s(settings: Settings) -> float:
    """How long a controller may not go on until it counts as hung."""
    return silence.hung_after_s(settings.lease_s, settings.orphan_timeout_s, settings.reroute_timeout_s)


def run(settings: Settings, pods: bool = False, folder: Path | None = None) -> int:
    """Lead until SIGTERM or SIGINT, which ends the workers as well unless they are pods; returns the exit code. The end
    of a pipe at standard input is like SIGTERM.

    In `folder` it keeps a pulse, by which others see that it hangs. Unless workers are pods, which do not end for want
    of a controller, it also leaves there what the next one needs to hold them while the store is away. Raises
    `ForetokenError` for what stands in the way.
    """
    logs.configure(settings.log_level, settings.log_format)
    if settings.store is None:
        raise ConfigError(
            "a cluster's controller keeps its records in the store: set FORETOKEN_STORE, or `store` in the config "
            "file, to its url (redis://…)",
            param="store",
        )
    pulse = Pulse(folder / PULSE_NAME if folder is not None else None)
    with contextlib.ExitStack() as stack:
        last_known = stack.enter_context(open_last_known(folder)) if folder is not None and not pods else None
        runner = stack.enter_context(asyncio.Runner(loop_factory=loop_factory()))
        return runner.run(_lead(settings, settings.store, pods, pulse, last_known))


async def _lead(
    settings: Settings, store_url: SecretStr, pods: bool, pulse: Pulse, last_known: LastKnown | None
) -> int:
    stop = asyncio.Event()
    on_signals(stop, lambda: os._exit(EXIT_AT_ONCE))
    if not pods:
        stop_with_stdin(stop)  # without who started it nobody could use what it leads
    store = open_store(store_url.get_secret_value(), namespace=settings.cluster_name)
    launcher: Launcher = PodLauncher(store) if pods else RayLauncher(settings)
    nodes = asyncio.create_task(_nodes(launcher))  # the bridge to Ray takes as long to start as a model to be read
    try:
        model = await pulse.during(asyncio.to_thread(find_model, settings))
        device = await pulse.during(_device(settings, nodes))
        controller = Controller(
            settings,
            store=store,
            launcher=launcher,
            model=model,
            shape=await pulse.during(asyncio.to_thread(describe, model.path, device)),
            machine=this_machine(),
            last_known=last_known,
            beat=pulse.beat,
        )
        await controller.run(stop)
    except LostLeadError as error:
        logger.error("this controller steps down: %s", error)
        return EXIT_LOST_LEAD
    finally:
        nodes.cancel()
        await asyncio.gather(nodes, return_exceptions=True)
        await launcher.close()
        await store.close()
    return 0


async def _nodes(launcher: Launcher) -> tuple[Node, ...]:
    """Those of the first look, if any; what stands between us and them is told of by later ones."""
    try:
        return (await launcher.topology()).nodes
    except UnavailableError:
        return ()


async def _device(settings: Settings, nodes: asyncio.Task[tuple[Node, ...]]) -> str:
    """What kind of device the workers will be on: weights may be larger on one than on another.

    Workers may be waiting for a controller, so that nodes that cannot be seen now are not waited for.
    """
    if settings.device != "auto" or settings.local is not None:  # all nodes are this machine
        return settings.device
    await asyncio.wait({nodes}, timeout=NODES_TIMEOUT_S)
    kinds = {device.kind for node in nodes.result() for device in node.compute_devices} if nodes.done() else set()
    return "cuda" if "cuda" in kinds else "cpu" if kinds else "auto"
