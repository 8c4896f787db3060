"""Registry, placement and other small shared state: embedded by default, Redis in a cluster."""

from __future__ import annotations

from cluster.store.base import Store


def open_store(url: str | None, *, namespace: str = "foretoken") -> Store:
    """The store of an url (redis://, rediss://, unix://), or an embedded one where it is None. Nothing is opened yet.

    Raises `ConfigError` for an url that cannot be read.
    """
    if url is None:
        from cluster.store.memory import MemoryStore

        return MemoryStore()

    from cluster.store.redis import RedisStore

    return RedisStore(url, namespace=namespace)
