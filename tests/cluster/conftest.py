from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ray_cluster import RayCluster

RECONNECT_TIMEOUT_S = 4  # Ray waits for a head that is away for a minute; here it gives up sooner


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    """Three Ray nodes on this machine, for a file of tests: who ends one starts it again."""
    cluster = RayCluster(3, RECONNECT_TIMEOUT_S)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
