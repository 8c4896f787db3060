"""Which cluster is which: two may have one name on one Ray, and neither must take the other's workers for its own.

A cluster is its store. The id under which it is known stands there, and in its folder on each machine that it was led
from: a `cluster up` without a store of its own begins with an empty one each time and is the same cluster all the same.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from pathlib import Path

from cluster.config import Settings
from cluster.control.worker_folders import cluster_folder
from cluster.errors import ConfigError
from cluster.files import write_whole
from cluster.store import open_store
from cluster.store.base import Store
from cluster.store.records import CLUSTER_ID_KEY

ID_BYTES = 8
ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")


async def cluster_id(settings: Settings) -> str:
    """The cluster's id. Raises `StoreUnavailableError`, and `ConfigError` where its folder cannot be written."""
    if settings.store is None:
        return kept_id(settings)
    store = open_store(settings.store.get_secret_value(), namespace=settings.cluster_name)
    try:
        return await agreed_id(store, settings)
    finally:
        await store.close()


async def agreed_id(store: Store, settings: Settings) -> str:
    """The id in the store, which this machine keeps from now on; where there is none, this machine's becomes it."""
    ours = kept_id(settings)
    while True:
        held = await store.get(CLUSTER_ID_KEY)
        found = held.value.decode(errors="replace") if held is not None else ""
        if ID.fullmatch(found):
            if found != ours:
                _keep(_path(settings), found)
            return found
        expected = held.version if held is not None else 0
        await store.compare_and_set(CLUSTER_ID_KEY, ours.encode(), expected=expected)


def kept_id(settings: Settings) -> str:
    """The id in the cluster's folder on this machine, made where there is none. Raises `ConfigError`."""
    path = _path(settings)
    with contextlib.suppress(OSError, ValueError):
        if ID.fullmatch(found := path.read_text(encoding="ascii")):
            return found
    made = secrets.token_hex(ID_BYTES)
    _keep(path, made)
    return made


def _path(settings: Settings) -> Path:
    return cluster_folder(settings) / "id"


def _keep(path: Path, value: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, value.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="home") from error
