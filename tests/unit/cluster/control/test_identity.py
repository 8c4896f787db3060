from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.config import Settings, load
from cluster.control.identity import ID, agreed_id, cluster_id, kept_id
from cluster.errors import ConfigError
from cluster.store.memory import MemoryStore
from cluster.store.records import CLUSTER_ID_KEY


def _settings(home: Path, name: str = "one") -> Settings:
    return load({"home": home, "cluster_name": name})


def test_a_machine_keeps_a_clusters_id_by_its_home_and_name(tmp_path: Path) -> None:
    ours = kept_id(_settings(tmp_path))
    assert ID.fullmatch(ours)
    assert asyncio.run(cluster_id(_settings(tmp_path))) == ours
    assert len({ours, kept_id(_settings(tmp_path, "two")), kept_id(_settings(tmp_path / "elsewhere"))}) == 3


def test_who_shares_a_store_is_one_cluster_and_stays_it_when_the_store_is_emptied(tmp_path: Path) -> None:
    first, second = _settings(tmp_path / "a"), _settings(tmp_path / "b")

    async def scenario() -> None:
        store = MemoryStore()
        assert kept_id(second) != kept_id(first)
        ours = await agreed_id(store, first)
        assert ours == kept_id(first)
        assert await agreed_id(store, second) == ours == kept_id(second)
        assert await agreed_id(MemoryStore(), second) == ours

    asyncio.run(scenario())


def test_what_is_no_id_is_replaced(tmp_path: Path) -> None:
    settings = _settings(tmp_path)

    async def scenario() -> None:
        store = MemoryStore()
        await store.compare_and_set(CLUSTER_ID_KEY, b"\xff of another release", expected=0)
        ours = await agreed_id(store, settings)
        held = await store.get(CLUSTER_ID_KEY)
        assert held is not None
        assert held.value == ours.encode()
        (path,) = settings.home.glob("clusters/*/id")
        path.write_bytes(b"\xff")
        assert await agreed_id(store, settings) == ours == path.read_text()

    asyncio.run(scenario())


def test_a_home_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "clusters").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot write") as caught:
        kept_id(_settings(tmp_path))
    assert caught.value.param == "home"
