"""What every store promises: one suite, run on the embedded one and on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidValueError
from cluster.store.base import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Change,
    Deleted,
    Put,
    Snapshot,
    Store,
    Versioned,
    Watch,
)
from cluster.store.memory import MemoryStore
from cluster.store.redis import RedisStore
from tests.support.eventually import eventually

DEADLINE_S = 30.0
World = Callable[[], Store]
NewWorld = Callable[..., World]


def _run(body: Callable[..., Awaitable[None]], *worlds: World) -> None:
    """`body` with one client of each world, closed afterwards."""

    async def bounded() -> None:
        stores = [world() for world in worlds]
        async with asyncio.timeout(2 * DEADLINE_S):
            await body(*stores)
        for store in stores:
            await store.close()

    asyncio.run(bounded())


async def _changes(watch: Watch, num: int) -> list[Change]:
    """The next `num` events, none of which is a snapshot."""
    found: list[Change] = []
    while len(found) < num:
        event = await watch.next(DEADLINE_S)
        assert isinstance(event, Put | Deleted), event
        found.append(event)
    return found


class _Waits:
    """A store, as a `Watch` reads it, that says when the watch has begun to wait."""

    def __init__(self, store: Store) -> None:
        assert isinstance(store, MemoryStore | RedisStore)
        self.poll, self.snapshot = store.poll, store.snapshot
        self.began = asyncio.Event()
        self._store = store

    async def wait_for_change(self, room: str, after: int, timeout_s: float) -> None:
        self.began.set()
        await self._store.wait_for_change(room, after, timeout_s)


async def _snapshot(watch: Watch) -> Snapshot:
    event = await watch.next(DEADLINE_S)
    assert isinstance(event, Snapshot), event
    return event


def test_a_value_is_read_back_with_its_version(world: World) -> None:
    async def body(store: Store) -> None:
        value = bytes(range(256))
        version = await store.compare_and_set("workers/a", value, expected=0)
        assert version is not None
        assert version > 0
        assert await store.get("workers/a") == Versioned(value, version)
        assert await store.get("workers/b") is None
        assert await store.get("other/a") is None

    _run(body, world)


def test_create_only_refuses_a_key_that_is_there(world: World) -> None:
    async def body(store: Store) -> None:
        version = await store.compare_and_set("r/k", b"1", expected=0)
        assert version is not None
        assert await store.compare_and_set("r/k", b"2", expected=0) is None
        assert await store.get("r/k") == Versioned(b"1", version)

    _run(body, world)


def test_only_the_present_version_is_replaced_or_deleted(world: World) -> None:
    async def body(store: Store) -> None:
        first = await store.compare_and_set("r/k", b"1", expected=0)
        assert first is not None
        second = await store.compare_and_set("r/k", b"2", expected=first)
        assert second is not None
        assert second > first
        assert await store.compare_and_set("r/k", b"3", expected=first) is None
        assert await store.compare_and_set("r/k", None, expected=first) is None
        assert await store.get("r/k") == Versioned(b"2", second)
        assert await store.compare_and_set("r/k", None, expected=second) is not None
        assert await store.get("r/k") is None

    _run(body, world)


def test_a_version_is_never_used_again_after_a_deletion(world: World) -> None:
    async def body(store: Store) -> None:
        old = await store.compare_and_set("r/k", b"same", expected=0)
        assert old is not None
        await store.compare_and_set("r/k", None, expected=old)
        new = await store.compare_and_set("r/k", b"same", expected=0)
        assert new is not None
        assert new > old
        assert await store.compare_and_set("r/k", b"stale", expected=old) is None

    _run(body, world)


def test_entries_are_those_under_the_prefix(world: World) -> None:
    async def body(store: Store) -> None:
        for key in ("r/a1", "r/a2", "r/b1", "s/a1"):
            await store.compare_and_set(key, key.encode(), expected=0)
        assert {key: held.value for key, held in (await store.entries("r/a")).items()} == {
            "r/a1": b"r/a1",
            "r/a2": b"r/a2",
        }
        assert list(await store.entries("r/")) == ["r/a1", "r/a2", "r/b1"]
        assert await store.entries("empty/") == {}

    _run(body, world)


def test_of_clients_that_write_at_once_exactly_one_wins(world: World) -> None:
    async def body(*stores: Store) -> None:
        expected = 0
        for turn in range(20):
            written = await asyncio.gather(
                *(
                    store.compare_and_set("r/epoch", f"{turn} by {i}".encode(), expected=expected)
                    for i, store in enumerate(stores)
                )
            )
            (winner,) = [i for i, version in enumerate(written) if version is not None]
            held = await stores[0].get("r/epoch")
            assert held == Versioned(f"{turn} by {winner}".encode(), written[winner] or 0)
            expected = held.version

    _run(body, *[world] * 8)


def test_counting_by_several_clients_loses_no_increment(world: World) -> None:
    async def body(*stores: Store) -> None:
        async def count(store: Store) -> None:
            for _ in range(10):
                while True:
                    held = await store.get("r/n") or Versioned(b"0", 0)
                    value = b"%d" % (int(held.value) + 1)
                    if await store.compare_and_set("r/n", value, expected=held.version) is not None:
                        break

        await asyncio.gather(*map(count, stores))
        held = await stores[0].get("r/n")
        assert held is not None
        assert held.value == b"40"

    _run(body, *[world] * 4)


def test_a_watch_begins_with_a_snapshot_and_goes_on_with_every_change(world: World) -> None:
    async def body(store: Store, other: Store) -> None:
        a = await other.compare_and_set("r/a", b"1", expected=0) or 0
        watch = store.watch("r/")
        assert await _snapshot(watch) == Snapshot({"r/a": Versioned(b"1", a)}, "start")
        a2 = await other.compare_and_set("r/a", b"2", expected=a) or 0
        b = await other.compare_and_set("r/b", b"3", expected=0) or 0
        gone = await other.compare_and_set("r/a", None, expected=a2) or 0
        assert await _changes(watch, 3) == [
            Put("r/a", b"2", a2),
            Put("r/b", b"3", b),
            Deleted("r/a", gone, expired=False),
        ]
        assert a < a2 < b < gone
        assert await watch.next(0.0) is None

    _run(body, world, world)


def test_a_watch_sees_its_prefix_only(world: World) -> None:
    async def body(store: Store) -> None:
        watch = store.watch("r/a")
        await _snapshot(watch)
        for key in ("r/b", "s/a", "r/a1"):
            await store.compare_and_set(key, b"", expected=0)
        (change,) = await _changes(watch, 1)
        assert change.key == "r/a1"

    _run(body, world)


def test_a_change_wakes_a_waiting_watch(world: World) -> None:
    async def body(store: Store, other: Store) -> None:
        waits = _Waits(store)
        watch = Watch(waits, "r/")
        await _snapshot(watch)
        waiting = asyncio.create_task(_changes(watch, 1))
        await waits.began.wait()
        version = await other.compare_and_set("r/a", b"1", expected=0)
        assert await waiting == [Put("r/a", b"1", version or 0)]

    _run(body, world, world)


def test_no_change_is_lost_between_snapshot_and_watch(world: World) -> None:
    """Watches begin while another client writes: each sees every value from its snapshot on, once and in order."""

    async def body(store: Store, writer: Store) -> None:
        last = 60

        async def write() -> None:
            version = 0
            for i in range(1, last + 1):
                version = await writer.compare_and_set("r/n", b"%d" % i, expected=version) or 0
                await asyncio.sleep(0)

        async def follow() -> None:
            watch = store.watch("r/")
            entries = (await _snapshot(watch)).entries
            seen = int(entries["r/n"].value) if entries else 0
            while seen < last:
                (change,) = await _changes(watch, 1)
                assert isinstance(change, Put)
                assert int(change.value) == seen + 1
                seen += 1

        writing = asyncio.create_task(write())
        for _ in range(5):
            await asyncio.gather(follow(), asyncio.sleep(0))
        await writing

    _run(body, world, world)


def test_a_watch_that_falls_behind_goes_on_with_a_snapshot_that_says_so(new_world: NewWorld) -> None:
    async def body(store: Store) -> None:
        watch = store.watch("r/")
        await _snapshot(watch)
        version = 0
        for i in range(20):
            version = await store.compare_and_set("r/n", b"%d" % i, expected=version) or 0
        assert await _snapshot(watch) == Snapshot({"r/n": Versioned(b"19", version)}, "behind")
        after = await store.compare_and_set("r/n", b"20", expected=version) or 0
        assert await _changes(watch, 1) == [Put("r/n", b"20", after)]

    _run(body, new_world(log_length=8))


def test_a_lease_that_ends_is_a_deletion_that_watchers_see(world: World) -> None:
    async def body(store: Store, other: Store) -> None:
        watch = store.watch("r/")
        await _snapshot(watch)
        begin = time.monotonic()
        version = await other.compare_and_set("r/a", b"1", expected=0, ttl_s=0.1) or 0
        put, deleted = await _changes(watch, 2)
        assert put == Put("r/a", b"1", version)
        assert deleted == Deleted("r/a", deleted.version, expired=True)
        assert deleted.version > version
        assert time.monotonic() - begin >= 0.09  # and not at once
        assert await other.get("r/a") is None
        assert not await other.renew("r/a", expected=version, ttl_s=1.0)

    _run(body, world, world)


async def _is_gone(store: Store, key: str) -> bool:
    return await store.get(key) is None


def test_an_ended_lease_is_not_there_though_nobody_watches(world: World) -> None:
    async def body(store: Store) -> None:
        old = await store.compare_and_set("r/a", b"1", expected=0, ttl_s=0.05)
        await eventually(lambda: _is_gone(store, "r/a"))
        assert await store.compare_and_set("r/a", b"2", expected=old or 0) is None
        assert await store.compare_and_set("r/a", b"2", expected=0) is not None

    _run(body, world)


def test_a_renewed_lease_lives_on_without_an_event(world: World) -> None:
    async def body(store: Store) -> None:
        kept = await store.compare_and_set("r/kept", b"", expected=0, ttl_s=0.2) or 0
        await store.compare_and_set("r/ends", b"", expected=0, ttl_s=0.3)
        watch = store.watch("r/")
        await _snapshot(watch)
        assert await store.renew("r/kept", expected=kept, ttl_s=60.0)
        (change,) = await _changes(watch, 1)  # its first lease would have ended before the other's
        assert change == Deleted("r/ends", change.version, expired=True)
        assert await store.get("r/kept") == Versioned(b"", kept)
        assert not await store.renew("r/kept", expected=kept + 100, ttl_s=60.0)
        assert not await store.renew("r/never", expected=1, ttl_s=60.0)

    _run(body, world)


def test_writing_without_a_lease_ends_the_old_one(world: World) -> None:
    async def body(store: Store) -> None:
        first = await store.compare_and_set("r/a", b"1", expected=0, ttl_s=0.2) or 0
        assert await store.compare_and_set("r/a", b"2", expected=first) is not None
        await store.compare_and_set("r/b", b"", expected=0, ttl_s=0.3)
        watch = store.watch("r/")
        await _snapshot(watch)
        (change,) = await _changes(watch, 1)
        assert change.key == "r/b"
        assert await store.get("r/a") is not None

    _run(body, world)


def test_a_watch_returns_none_after_its_timeout(world: World) -> None:
    async def body(store: Store) -> None:
        watch = store.watch("r/")
        await _snapshot(watch)
        begin = time.monotonic()
        assert await watch.next(0.1) is None
        assert 0.09 <= time.monotonic() - begin < DEADLINE_S

    _run(body, world)


def test_a_cancelled_wait_loses_nothing(world: World) -> None:
    async def body(store: Store) -> None:
        waits = _Waits(store)
        watch = Watch(waits, "r/")
        await _snapshot(watch)
        waiting = asyncio.create_task(watch.next(DEADLINE_S))
        await waits.began.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        version = await store.compare_and_set("r/a", b"", expected=0)
        assert await _changes(watch, 1) == [Put("r/a", b"", version or 0)]

    _run(body, world)


def test_values_are_bytes_of_any_kind_however_they_are_read(world: World) -> None:
    async def body(store: Store) -> None:
        watch = store.watch("r/")
        await _snapshot(watch)
        wanted: dict[str, Versioned] = {}
        for i, value in enumerate((b"\xff", b"\xc3\x28", b"\x00\r\n", b"")):
            version = await store.compare_and_set(f"r/{i}", value, expected=0) or 0
            wanted[f"r/{i}"] = Versioned(value, version)
            assert await _changes(watch, 1) == [Put(f"r/{i}", value, version)]
        assert {key: await store.get(key) for key in wanted} == wanted
        assert await store.entries("r/") == wanted
        assert (await _snapshot(store.watch("r/"))).entries == wanted

    _run(body, world)


@pytest.mark.parametrize(
    "key",
    ["", "room", "/name", "room/", "a b/c", "r/é", "r/\udcff", "r/\x7f", "r/a b", "r/a\n", "{r}/a", "r/" + "k" * 511],
)
def test_a_malformed_key_is_refused(world: World, key: str) -> None:
    async def body(store: Store) -> None:
        for call in (
            store.get(key),
            store.compare_and_set(key, b"", expected=0),
            store.renew(key, expected=1, ttl_s=1.0),
        ):
            with pytest.raises(InvalidValueError, match="the store's key"):
                await call

    _run(body, world)


def test_bounds_of_key_value_and_lease(world: World) -> None:
    async def body(store: Store) -> None:
        longest = "r/" + "k" * (MAX_KEY_BYTES - 2)
        largest = bytes(MAX_VALUE_BYTES)
        version = await store.compare_and_set(longest, largest, expected=0)
        assert await store.get(longest) == Versioned(largest, version or 0)
        with pytest.raises(InvalidValueError, match=str(MAX_VALUE_BYTES)):
            await store.compare_and_set("r/k", largest + b"1", expected=0)
        for ttl_s in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(InvalidValueError, match="ttl_s"):
                await store.compare_and_set("r/k", b"", expected=0, ttl_s=ttl_s)
            with pytest.raises(InvalidValueError, match="ttl_s"):
                await store.renew("r/k", expected=1, ttl_s=ttl_s)
        with pytest.raises(InvalidValueError, match="prefix"):
            store.watch("no-room")
        assert await store.get("r/k") is None

    _run(body, world)


KEYS = ("r/a", "r/b", "r/ab")
operations = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.none() | st.binary(max_size=4),  # None: delete
        st.sampled_from(["present", "none", "stale"]),
        st.booleans(),  # with a lease that does not end here
    ),
    max_size=25,
)


@given(operations)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_writes_does_what_a_dictionary_does(
    new_world: NewWorld, sequence: list[tuple[str, bytes | None, str, bool]]
) -> None:
    async def body(store: Store) -> None:
        watch = store.watch("r/a")
        await _snapshot(watch)
        model: dict[str, Versioned] = {}
        stale: dict[str, int] = {}
        changes: list[Change] = []
        newest = 0
        for key, value, kind, lease in sequence:
            held = model.get(key)
            present = held.version if held else 0
            expected = {"present": present, "none": 0, "stale": stale.get(key, 1)}[kind]
            version = await store.compare_and_set(key, value, expected=expected, ttl_s=600.0 if lease else None)
            assert (version is not None) == (expected == present)
            if version is not None and (value is not None or held):
                assert version > newest
                newest = version
                if held:
                    stale[key] = held.version
                if value is None:
                    del model[key]
                    changes.append(Deleted(key, version, expired=False))
                else:
                    model[key] = Versioned(value, version)
                    changes.append(Put(key, value, version))
            assert await store.get(key) == model.get(key)
        assert await store.entries("r/") == model
        watched = [change for change in changes if change.key.startswith("r/a")]
        assert await _changes(watch, len(watched)) == watched
        assert await watch.next(0.0) is None

    _run(body, new_world())
