"""What the store of responses keeps, and what goes when there is no room."""

from __future__ import annotations

import pytest

from cluster.gateway.openai import ChatMessage
from cluster.gateway.response_store import ResponseStore, StoredResponse


def turn(response_id: str, text: str = "", previous: StoredResponse | None = None) -> StoredResponse:
    return StoredResponse(response_id, b"{}", (), (ChatMessage(role="user", content=text),), previous)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_tenant_sees_its_own() -> None:
    store = ResponseStore()
    kept = turn("resp_1")
    assert store.of("a").keep(kept)
    assert store.of("a").find("resp_1") is kept
    for other in ("b", ""):
        assert store.of(other).find("resp_1") is None
        assert not store.of(other).forget("resp_1")
    assert store.of("a").forget("resp_1")
    assert not store.of("a").forget("resp_1")
    assert (store.num_responses, store.num_bytes) == (0, 0)


def test_a_conversation_is_counted_once_and_outlives_its_beginning() -> None:
    store = ResponseStore()
    kept = store.of("")
    first = turn("resp_1", "a" * 1000)
    second = turn("resp_2", "b" * 1000, first)
    third = turn("resp_3", "c" * 1000, first)
    for each in (first, second, third):
        kept.keep(each)
    assert store.num_bytes == first.num_bytes + second.num_bytes + third.num_bytes
    assert kept.forget("resp_1")
    assert kept.find("resp_1") is None
    assert [message.content[0] for message in second.conversation if message.content] == ["a", "b"]
    assert store.num_bytes == first.num_bytes + second.num_bytes + third.num_bytes, "others stand on it"
    assert kept.forget("resp_2")
    assert store.num_bytes == first.num_bytes + third.num_bytes
    fourth = turn("resp_4", "", second)
    kept.keep(fourth)  # one that was under way when the one before was forgotten
    assert store.num_bytes == first.num_bytes + second.num_bytes + third.num_bytes + fourth.num_bytes
    assert kept.forget("resp_3")
    assert kept.forget("resp_4")
    assert (store.num_responses, store.num_bytes) == (0, 0)


def test_a_long_conversation() -> None:
    store = ResponseStore()
    last: StoredResponse | None = None
    for number in range(5000):
        last = turn(f"resp_{number}", str(number), last)
        store.of("").keep(last)
    assert last is not None
    assert [message.content for message in last.conversation] == [str(number) for number in range(5000)]


def test_who_holds_the_most_loses_the_oldest() -> None:
    store = ResponseStore(max_responses=4)
    store.of("small").keep(turn("resp_0"))
    for number in range(1, 6):
        store.of("large").keep(turn(f"resp_{number}"))
    assert store.num_responses == 4
    assert store.of("small").find("resp_0") is not None
    found = [number for number in range(1, 6) if store.of("large").find(f"resp_{number}")]
    assert found == [3, 4, 5]


def test_bytes_are_bounded() -> None:
    size = turn("resp_0", "a" * 10_000).num_bytes
    store = ResponseStore(max_bytes=3 * size + size // 2)
    store.of("small").keep(turn("resp_0"))
    for number in range(1, 6):
        assert store.of("large").keep(turn(f"resp_{number}", "a" * 10_000))
        assert store.num_bytes <= 3 * size + size // 2
    found = [number for number in range(6) if store.of("large").find(f"resp_{number}")]
    assert found == [3, 4, 5]
    assert store.of("small").find("resp_0") is not None
    assert not store.of("large").keep(turn("resp_6", "a" * 10 * size)), "larger than all that may be kept"
    assert store.num_bytes <= 3 * size + size // 2
    assert turn("wide", "🦀" * 1000).num_bytes - turn("wide").num_bytes > 4000


def test_a_response_grows_old(clock: Clock) -> None:
    store = ResponseStore(max_age_s=60, clock=clock)
    kept = store.of("")
    kept.keep(turn("resp_1"))
    clock.now = 60
    assert kept.find("resp_1") is not None
    clock.now = 61
    assert kept.find("resp_1") is None
    assert not kept.forget("resp_1")
    kept.keep(turn("resp_2"))
    assert store.num_responses == 1
