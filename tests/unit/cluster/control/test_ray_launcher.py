"""The launcher's side of the bridge, with a program in the bridge's place: no Ray is needed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.config import load
from cluster.control import ray_launcher
from cluster.control.ray_launcher import LINE_LIMIT_BYTES, RayLauncher
from cluster.control.topology import Topology
from cluster.errors import UnavailableError
from cluster.machine import free_port

DEADLINE_S = 60.0
# It is connected at once and knows no node; to its first call it says what stands in a file, and takes that away.
BRIDGE = """
import json, pathlib, sys
said = pathlib.Path(sys.argv[1])
sys.stdin.readline()
print(json.dumps({"id": 0}), flush=True)
for line in sys.stdin:
    call = json.loads(line)
    if said.exists():
        text = said.read_text().replace("<id>", str(call["id"]))
        said.unlink()
        print(text, flush=True)
    else:
        print(json.dumps({"id": call["id"], "result": []}), flush=True)
"""


@asynccontextmanager
async def _launcher(
    home: Path, monkeypatch: pytest.MonkeyPatch, said: str = "", address: str | None = None
) -> AsyncIterator[RayLauncher]:
    path = home / "said"
    if said:
        path.write_text(said)
    monkeypatch.setattr(ray_launcher, "BRIDGE", (sys.executable, "-S", "-c", BRIDGE, str(path)))
    monkeypatch.setattr(ray_launcher, "CONNECT_TIMEOUT_S", DEADLINE_S)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    launcher = RayLauncher(load({"home": home}), address=address, environment=environment)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield launcher
    finally:
        await launcher.close()


async def _topology(launcher: RayLauncher) -> Topology:
    """As soon as there is a bridge that tells it."""
    while True:
        try:
            return await launcher.topology()
        except UnavailableError:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "said", ["no JSON", '{"id": "one"}', "[" * 5000, "x" * (LINE_LIMIT_BYTES + 1)], ids=["text", "type", "deep", "long"]
)
def test_a_bridge_that_says_what_cannot_be_read_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    async def scenario() -> None:
        async with _launcher(tmp_path, monkeypatch, said) as launcher:
            with pytest.raises(UnavailableError, match="ended before it answered"):
                await launcher.topology()
            with pytest.raises(UnavailableError, match="said what cannot be read"):
                await launcher.topology()
            assert await _topology(launcher) == Topology(())

    asyncio.run(scenario())


def test_an_answer_of_the_wrong_kind_is_an_error_of_that_call_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with _launcher(tmp_path, monkeypatch, '{"id": <id>, "result": 7}') as launcher:
            with pytest.raises(UnavailableError, match="answer to nodes cannot be read"):
                await launcher.topology()
            bridge = launcher.bridge_pid
            assert await launcher.topology() == Topology(())
            assert launcher.bridge_pid == bridge is not None

    asyncio.run(scenario())


def test_no_bridge_is_started_before_something_answers_at_rays_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port("127.0.0.1")

    async def scenario() -> None:
        async with _launcher(tmp_path, monkeypatch, address=f"127.0.0.1:{port}") as launcher:
            with pytest.raises(UnavailableError, match=rf"nothing answers at 127\.0\.0\.1:{port}"):
                await launcher.topology()
            assert launcher.bridge_pid is None
            async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port):
                assert await _topology(launcher) == Topology(())

    asyncio.run(scenario())
