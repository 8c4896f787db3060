from __future__ import annotations

import pytest

from cluster.config import load
from cluster.errors import ConfigError
from cluster.operate import controller, worker


@pytest.mark.parametrize(
    ("role", "name", "place"),
    [
        ("expert", "expert-0", "expert-0"),
        ("expert", "foretoken-expert-12", "expert-12"),
        ("attention", "a-b-attention-3", "attention-3"),
    ],
)
def test_a_pods_name_ends_with_its_place(role: str, name: str, place: str) -> None:
    assert worker.place_of(role, name) == place


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
        worker.place_of(role, name)


def test_where_others_reach_it_is_as_told_or_as_it_listens_or_as_found() -> None:
    assert worker.advertised_host(load({"advertise": "10.0.0.9", "host": "0.0.0.0"})) == "10.0.0.9"
    assert worker.advertised_host(load({"host": "10.1.2.3"})) == "10.1.2.3"


def test_without_a_store_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORETOKEN_STORE", raising=False)
    settings = load()
    with pytest.raises(ConfigError, match="FORETOKEN_STORE"):
        worker.run(settings, "expert", "expert-0", "")
    with pytest.raises(ConfigError, match="FORETOKEN_STORE"):
        controller.run(settings)
