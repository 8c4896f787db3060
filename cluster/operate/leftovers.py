"""Ends a cluster's workers, and what a supervisor that was killed left behind."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path

from cluster.config import Settings
from cluster.control import detached
from cluster.control.ray_launcher import RayLauncher
from cluster.errors import ForetokenError
from cluster.operate.children import sweep
from cluster.operate.state_file import ClusterFiles

logger = logging.getLogger(__name__)

POLL_S = 0.05


async def end_workers(settings: Settings, files: ClusterFiles, timeout_s: float) -> None:
    """End every worker of the cluster, those that start just now included: SIGTERM, after `timeout_s` SIGKILL."""
    if settings.local is None:
        launcher = RayLauncher(settings)
        try:
            await launcher.end_all(timeout_s)
        except ForetokenError as error:
            logger.warning(
                "workers on other nodes end themselves in %g s: %s", settings.orphan_timeout_s, error.message
            )
        finally:
            await launcher.close()
    deadline = time.monotonic() + timeout_s
    _signal(files, kill=False)
    while _workers(files) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    kill_workers(files)


def kill_workers(files: ClusterFiles) -> None:
    """SIGKILL to the workers that run on this machine."""
    _signal(files, kill=True)


def clean_up(files: ClusterFiles) -> int:
    """End what a dead supervisor left on this machine; how many processes that were; blocks. Its lock must be held."""
    state = files.read()
    num_ended = len(_workers(files))
    kill_workers(files)
    if state is not None:
        num_ended += sweep(state.run_id, state.folder)
        shutil.rmtree(state.folder, ignore_errors=True)
        files.remove()
    if num_ended:
        logger.warning("ended %d processes that an earlier cluster %s had left behind", num_ended, files.name)
    return num_ended


def _workers(files: ClusterFiles) -> list[tuple[str, int]]:
    """Names and process ids of the workers that run on this machine: each has a file beside its log."""
    found = []
    for path in files.logs.glob("*.pid"):
        if (pid := _pid_in(path)) is not None and detached.is_running(pid, path.stem):
            found.append((path.stem, pid))
    return found


def _pid_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _signal(files: ClusterFiles, *, kill: bool) -> None:
    for name, pid in _workers(files):
        detached.end(pid, name, kill=kill)
