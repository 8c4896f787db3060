"""The Redis that the chart makes for a cluster's store: who gets in, with which password, and to what."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from cluster.errors import StoreUnavailableError
from cluster.store.redis import RedisStore
from tests.support.chart import (
    CLUSTER_SETS,
    FULLNAME,
    VALUE_SETS,
    Object,
    environment,
    every,
    maybe,
    one,
    pod_of,
    selects,
)

pytestmark = pytest.mark.needs("helm")

PLAIN = VALUE_SETS["cluster"]
NAME = f"{FULLNAME}-redis"
TIMEOUT_S = 20


def test_a_cluster_has_one_unless_it_has_a_store() -> None:
    kinds = ("StatefulSet", "Service", "Secret", "NetworkPolicy")
    assert all(maybe(PLAIN, kind, NAME) for kind in kinds)
    assert not any(maybe(values, kind, NAME) for values in ({}, VALUE_SETS["cluster_shared"]) for kind in kinds)
    assert maybe(VALUE_SETS["cluster_bare"], "NetworkPolicy", NAME) is None


def test_it_lets_the_clusters_processes_in_and_nobody_out() -> None:
    redis = one(PLAIN, "StatefulSet", NAME)
    spec = one(PLAIN, "NetworkPolicy", NAME)["spec"]
    assert selects(spec["podSelector"], redis)
    (rule,) = spec["ingress"]
    (source,) = rule["from"]
    (port,) = rule["ports"]
    assert port["port"] in [port["name"] for port in pod_of(PLAIN, "StatefulSet", NAME)["containers"][0]["ports"]]
    workloads = every(PLAIN, "Deployment") | every(PLAIN, "StatefulSet")
    let_in = {name for name, workload in workloads.items() if selects(source["podSelector"], workload)}
    assert let_in == set(workloads) - {NAME}
    assert (spec["policyTypes"], spec["egress"]) == (["Ingress", "Egress"], [])
    service = one(PLAIN, "Service", NAME)["spec"]
    assert selects(service["selector"], redis)
    assert not selects(one(PLAIN, "Service")["spec"]["selector"], redis)


def test_the_password_is_random_or_theirs() -> None:
    def reference(values: str, name: str = NAME) -> dict[str, str]:
        (container,) = pod_of(VALUE_SETS[values], "StatefulSet", name)["containers"]
        found: dict[str, str] = environment(container)["REDISCLI_AUTH"]["secretKeyRef"]
        return found

    def password(values: str, name: str = NAME) -> bytes:
        of = reference(values, name)
        return base64.b64decode(one(VALUE_SETS[values], "Secret", of["name"])["data"][of["key"]])

    assert len(password("cluster")) == 32
    assert password("cluster_full", "blue-moe-redis") != password("cluster")
    assert reference("cluster_bare") == {"name": "redis", "key": "password"}
    assert maybe(VALUE_SETS["cluster_bare"], "Secret", NAME) is None


@pytest.mark.parametrize("values", [name for name in CLUSTER_SETS if name != "cluster_shared"])
def test_the_processes_know_its_user_and_address(values: str) -> None:
    given = VALUE_SETS[values]
    (redis,) = [o for o in every(given, "StatefulSet").values() if o["metadata"]["name"].endswith("-redis")]
    name = redis["metadata"]["name"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (port,) = one(given, "Service", name)["spec"]["ports"]
    user = name.removesuffix("-redis")
    assert f'"user {user} on ' in container["command"][-1]
    for workload in [*every(given, "Deployment").values(), *every(given, "StatefulSet").values()]:
        if workload is not redis and workload["metadata"]["name"] != name:
            (process,) = workload["spec"]["template"]["spec"]["containers"]
            variables = environment(process)
            assert variables["FORETOKEN_STORE"] == f"redis://{user}:$(REDIS_PASSWORD)@{name}:{port['port']}/0"
            assert variables["REDIS_PASSWORD"] == environment(container)["REDISCLI_AUTH"]
            assert list(variables).index("REDIS_PASSWORD") < list(variables).index("FORETOKEN_STORE")  # it is expanded


@contextmanager
def _running(container: Object, password: str, folder: Path) -> Iterator[Path]:
    """The container's own command, with this test's folders and a socket for the port; the socket once it serves."""
    socket = folder / "redis.sock"
    shell, flags, script = container["command"]
    script = script.replace("/tmp/", f"{folder}/").replace("/data", str(folder)).rstrip()
    with subprocess.Popen(
        [shell, flags, f"{script} --port 0 --unixsocket {socket}"],
        env=_with(password),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as redis:
        try:
            assert redis.stdout is not None
            assert any("ready to accept connections" in line for line in redis.stdout)  # ends when Redis does
            yield socket
        finally:
            redis.terminate()
            redis.communicate(timeout=TIMEOUT_S)


def _with(password: str | None) -> dict[str, str]:
    return {"PATH": os.environ["PATH"]} | ({} if password is None else {"REDISCLI_AUTH": password})


@pytest.mark.timeout(60)
@pytest.mark.needs("redis", "linux")
@pytest.mark.parametrize("password", ["plain", 'a"b\\c $d %s'])
def test_it_asks_for_the_password_that_it_was_given(password: str, tmp_path: Path) -> None:
    (container,) = pod_of(PLAIN, "StatefulSet", NAME)["containers"]
    with _running(container, password, tmp_path) as socket:

        def probe(kind: str, variables: dict[str, str]) -> int:
            *start, command = container[f"{kind}Probe"]["exec"]["command"]
            ask = command.replace("redis-cli", f"redis-cli -s {socket}")
            done = subprocess.run([*start, ask], env=variables, capture_output=True, timeout=TIMEOUT_S, check=False)
            return done.returncode

        for kind in ("readiness", "liveness"):
            assert probe(kind, _with(password)) == 0
            assert probe(kind, _with("another")) != 0
            assert probe(kind, _with(None)) != 0
        written = tmp_path / "redis.conf"
        assert written.stat().st_mode & 0o077 == 0
        assert password not in written.read_text()


@pytest.mark.timeout(60)
@pytest.mark.needs("redis", "linux")
def test_its_user_gets_at_the_clusters_keys_and_no_others(tmp_path: Path) -> None:
    (container,) = pod_of(PLAIN, "StatefulSet", NAME)["containers"]

    async def use(socket: Path) -> None:
        url = f"unix://{quote(FULLNAME)}:secret@{socket}"
        async with RedisStore(url, namespace=FULLNAME) as store:
            version = await store.compare_and_set("workers/expert-main-0", b"record", expected=0, ttl_s=60)
            assert version is not None
            assert await store.renew("workers/expert-main-0", expected=version, ttl_s=60)
            assert set(await store.entries("workers/")) == {"workers/expert-main-0"}
            await store.wait_for_change("workers", 0, timeout_s=0.1)
        async with RedisStore(url, namespace="other") as other:
            with pytest.raises(StoreUnavailableError, match="permissions"):
                await other.get("workers/a")

    with _running(container, "secret", tmp_path) as socket:
        asyncio.run(use(socket))

        def command(*words: str) -> str:
            ask = ["redis-cli", "-s", str(socket), "--user", FULLNAME, *words]
            done = subprocess.run(
                ask, env=_with("secret"), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            return done.stdout

        denied = ("config get *", "flushall", "keys *", "acl list", "shutdown", f"publish {FULLNAME}:news hello")
        for words in denied:
            assert "NOPERM" in command(*words.split()), words
