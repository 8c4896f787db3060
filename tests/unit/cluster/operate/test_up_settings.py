from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from cluster.config import Settings, load
from cluster.errors import ConfigError
from cluster.operate import up
from tests.support import cluster_up


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FORETOKEN_{name.upper()}", raising=False)


def test_children_get_the_same_settings_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        {
            "home": tmp_path,
            "kv_cache_bytes": "64MiB",
            "prefix_cache": False,
            "local": 3,
            "token": "s",
            "lease_s": 0.5,
            "store": "redis://h:1/0",
            "api_key": "a:first-key-of-two-1\nsecond-key-of-two",
            "api_key_file": tmp_path / "keys",
            "admin_api_key": "another-key-for-admins",
            "share_prefix_cache": True,
        }
    )
    for name, value in up.settings_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load().model_dump() == settings.model_dump()


def test_clusters_through_ray_are_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="Linux only"):
        up.run(load({"local": 1}))


@pytest.mark.needs("linux", "ray", "demo")
def test_without_a_ray_it_says_how_to_start_one(tmp_path: Path) -> None:
    done = cluster_up.foretoken(tmp_path, "cluster", "up", environment={"RAY_ADDRESS": "127.0.0.1:1"})
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "nothing answers at 127.0.0.1:1" in error
    assert "--local N" in error
    assert not list((tmp_path / "clusters").glob("*/state.json"))


@pytest.mark.needs("linux")
def test_a_port_in_use_fails_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = load({"home": tmp_path, "local": 1, "port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match="is in use"):
            up.run(settings)
    assert not (tmp_path / "clusters").exists()


@pytest.mark.needs("linux", "demo")
@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "unix:///nowhere/redis.sock"])
def test_a_store_that_cannot_be_used_fails_before_anything_is_started(tmp_path: Path, url: str) -> None:
    done = cluster_up.foretoken(tmp_path, "cluster", "up", "--local", "1", "--store", url)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith("Error: the store (Redis) cannot be used")
    assert "without one `cluster up` starts a Redis of its own" in error
    assert not list((tmp_path / "clusters").glob("*/logs/*"))
