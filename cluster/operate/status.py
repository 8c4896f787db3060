"""`foretoken cluster status`: what the controller last wrote to the store."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from cluster.config import Settings
from cluster.errors import StoreUnavailableError, UnreadableValueError
from cluster.operate.down import NOT_DONE
from cluster.operate.show import print_status, work_per_s
from cluster.operate.state_file import ClusterFiles, SupervisorState, nothing_runs
from cluster.store import open_store
from cluster.store.base import Store
from cluster.store.records import ClusterStatus, read_status

SAMPLE_S = 1.0  # between two looks, for rates
SAMPLE_TIMEOUT_S = 3.0
POLL_S = 0.1


def run(settings: Settings, *, as_json: bool) -> int:
    """Print the status; returns the exit code."""
    files = ClusterFiles(settings)
    state = files.read() if files.is_held() else None
    url = settings.store.get_secret_value() if settings.store is not None else state.store if state else ""
    if not url:
        return _nothing(settings)
    try:
        before, after = asyncio.run(_look_twice(settings, url))
    except (StoreUnavailableError, UnreadableValueError) as error:
        print(f"{settings.cluster_name}: {error.message}")
        return NOT_DONE
    if before is None or after is None:
        return _nothing(settings)
    rates = work_per_s(before, after)
    if as_json:
        print(as_text(after, rates, state))
    else:
        print_status(after, rates, state, age_s=time.time() - after.at_s)
    return 0


def as_text(status: ClusterStatus, rates: dict[str, float], state: SupervisorState | None) -> str:
    """One line of JSON: the status, and beside it what only this machine knows."""
    told = _whole(status)
    experts = {worker.name for worker in status.workers if worker.role == "expert"}
    told["tokens_per_s"] = {name: round(rate, 3) for name, rate in rates.items() if name not in experts}
    told["rows_per_s"] = {name: round(rate, 3) for name, rate in rates.items() if name in experts}
    told["url"] = state.url if state else None
    told["supervisor_pid"] = state.pid if state else None
    told["processes"] = dict(state.children) if state else {}
    return msgspec.json.encode(told).decode()


def _whole(value: Any) -> Any:
    """A message as plain values with every field: on the wire defaults are left out."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    return [_whole(item) for item in value] if isinstance(value, tuple) else value


def _nothing(settings: Settings) -> int:
    print(f"{nothing_runs(settings)}; start one with `foretoken cluster up`")
    return NOT_DONE


async def _look_twice(settings: Settings, url: str) -> tuple[ClusterStatus | None, ClusterStatus | None]:
    store = open_store(url, namespace=settings.cluster_name)
    try:
        before = await read_status(store)
        return before, before if before is None else await _later(store, before)
    finally:
        await store.close()


async def _later(store: Store, before: ClusterStatus) -> ClusterStatus:
    """A status that is at least `SAMPLE_S` newer, or the newest that there is in time."""
    deadline = time.monotonic() + SAMPLE_TIMEOUT_S
    after = before
    while after.at_s < before.at_s + SAMPLE_S and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        after = await read_status(store) or after
    return after
