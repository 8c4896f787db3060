from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load
from cluster.control.topology import LOAD_SHARE
from cluster.errors import ConfigError
from cluster.operate import controller, worker


@pytest.mark.parametrize(
    ("role", "pod_name", "name"),
    [
        ("expert", "expert-0", "expert-0"),
        ("expert", "foretoken-expert-12", "expert-12"),
        ("attention", "a-b-attention-3", "attention-3"),
    ],
)
def test_a_pods_name_ends_with_its_workers(role: str, pod_name: str, name: str) -> None:
    assert worker.name_of(role, pod_name) == name


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        ("all", "all-0", "role is attention or expert, not 'all'"),
        ("expert", "attention-0", "not 'attention-0'"),
        ("expert", "expert", "not 'expert'"),
        ("expert", "expert-01", "not 'expert-01'"),
        ("expert", "myexpert-1", "not 'myexpert-1'"),
        ("expert", "expert-1-x", "not 'expert-1-x'"),
    ],
)
def test_another_name_is_refused(role: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worker.name_of(role, name)


def test_where_others_reach_it_is_as_told_or_as_it_listens_or_as_found() -> None:
    assert worker.advertised_host(load({"advertise": "10.0.0.9", "host": "0.0.0.0"})) == "10.0.0.9"
    assert worker.advertised_host(load({"host": "10.1.2.3"})) == "10.1.2.3"


@pytest.mark.needs("demo")
def test_a_worker_loads_at_least_what_its_record_says_that_it_holds(tmp_path: Path) -> None:
    settings = load({"home": tmp_path, "device": "cpu", "host": "127.0.0.1"})
    left_behind = worker.announce_path(settings, "expert-0")
    left_behind.parent.mkdir(parents=True)
    left_behind.write_text("another process's")
    record, launch = worker._prepare(settings, "expert-0", "n")
    assert launch.host_memory_bytes is not None
    assert record.memory_bytes <= launch.host_memory_bytes * LOAD_SHARE
    assert not left_behind.exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write") as caught:
        worker._prepare(load({"home": tmp_path / "file"}), "expert-0", "n")
    assert caught.value.param == "home"


def test_without_a_store_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORETOKEN_STORE", raising=False)
    settings = load()
    with pytest.raises(ConfigError, match="FORETOKEN_STORE"):
        worker.run(settings, "expert", "expert-0", "")
    with pytest.raises(ConfigError, match="FORETOKEN_STORE"):
        controller.run(settings)
