"""The orderly end of a cluster's workers: those with requests first, while the experts that they need are there."""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.control.launcher import Launcher
from cluster.control.roster import Member, Roster
from cluster.errors import UnavailableError

logger = logging.getLogger(__name__)

END_EXTRA_S = 2.0  # for workers to end, beside what runs
END_POLL_S = 0.05


async def end_in_order(roster: Roster, launcher: Launcher, drain_timeout_s: float) -> None:
    """End all and leave them; one that the launcher cannot reach is left to end by itself."""
    for role, timeout_s in (("attention", drain_timeout_s + END_EXTRA_S), ("expert", END_EXTRA_S)):
        members = [member for member in roster if member.record.role == role]
        await asyncio.gather(*(_end_worker(roster, launcher, member, timeout_s) for member in members))


async def _end_worker(roster: Roster, launcher: Launcher, member: Member, timeout_s: float) -> None:
    record = member.record
    deadline = time.monotonic() + timeout_s
    try:
        await launcher.stop(record, kill=False)
        while await launcher.is_running(record):
            if time.monotonic() > deadline:
                logger.warning("%s did not end in time and was killed", record.name)
                await launcher.stop(record, kill=True)
                break
            await asyncio.sleep(END_POLL_S)
    except UnavailableError as error:
        logger.warning("%s was left to end by itself: %s", record.name, error.message)
    roster.remove(member)
