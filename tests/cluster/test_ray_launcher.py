"""Workers through a real Ray: the processes are stand-ins that load nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.config import Settings, load
from cluster.control.placement import PlacedWorker
from cluster.control.ray_launcher import RayLauncher
from cluster.errors import CheckpointError, ConfigError, UnavailableError, WorkerLostError
from cluster.operate.children import Child, marked
from cluster.protocol import Launch
from cluster.store.records import WorkerRecord
from tests.support.processes import has_ended
from tests.support.ray_cluster import RayCluster
from tests.support.stand_in_worker import COMMAND

pytestmark = [pytest.mark.needs("ray", "linux"), pytest.mark.timeout(120)]

DEADLINE_S = 40.0
PATIENT_TIMEOUT_S = 300  # of Ray nodes without a head: longer than a test may last
ACTOR = "ray::WorkerActor"
TOKEN = "a-worker's-token"
MEMORY_BYTES = 64 * 2**20


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    name = f"t{abs(hash(request.node.name)) % 10**8}"  # a namespace of its own
    return load({"home": tmp_path, "local": 3, "cluster_name": name, "start_timeout_s": 30.0})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def processes(settings: Settings) -> Iterator[None]:
    """Nothing of a test runs on after it."""
    yield
    for path in settings.home.glob("clusters/*/logs/*.pid"):
        pid = int(path.read_text())
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def _launcher(cluster: RayCluster, settings: Settings) -> AsyncIterator[RayLauncher]:
    launcher = RayLauncher(settings, command=COMMAND, address=cluster.address, environment=cluster.environment)
    try:
        yield launcher
    finally:
        await launcher.close()


async def _eventually(what: Callable[[], Awaitable[bool]]) -> None:
    """Until `what` holds; a launcher that cannot answer is asked again."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            if await what():
                return
        except UnavailableError:
            pass
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def _worker(cluster: RayCluster, index: int = 0, node: int = 1) -> PlacedWorker:
    return PlacedWorker("expert", index, cluster.names[node], "cpu", MEMORY_BYTES)


def _launch(worker: PlacedWorker, model: Path) -> Launch:
    return Launch(
        address="", model_path=str(model), served_name="m", name=worker.id, node_id=worker.node_id, token=TOKEN
    )


async def _start(launcher: RayLauncher, cluster: RayCluster, model: Path, node: int = 1) -> WorkerRecord:
    worker = _worker(cluster, node=node)
    return await launcher.start(worker, _launch(worker, model))


def _raylet_of(node: Child) -> int:
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    (raylet,) = [int(pid) for pid in children if "raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text()]
    return raylet


def test_the_topology_has_each_node_by_name(ray_cluster: RayCluster, settings: Settings) -> None:
    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            topology = await launcher.topology()
        assert [node.id for node in topology.nodes] == ray_cluster.names
        for node in topology.nodes:
            assert [device.id for device in node.compute_devices] == ["cpu"]
            assert node.compute_devices[0].memory_bytes > MEMORY_BYTES
            assert node.num_cores > 0
        assert len({node.machine for node in topology.nodes}) == 1
        total = sum(node.host_memory_bytes for node in topology.nodes)
        assert total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # they share it

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_worker_is_started_watched_and_stopped(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            record = await _start(launcher, ray_cluster, model)
            assert (record.name, record.role, record.node_id) == ("expert-0", "expert", ray_cluster.names[1])
            assert (record.address, record.memory_bytes) == ("127.0.0.1:1", MEMORY_BYTES)
            assert not has_ended(record.pid)
            assert await launcher.is_running(record)
            await launcher.stop(record, kill=False)
            await _eventually(lambda: _not(launcher.is_running(record)))
            assert has_ended(record.pid)
            await launcher.stop(record, kill=True)  # nothing where it is gone
            assert not await launcher.adopt(record)

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_worker_knows_its_launch_and_nothing_of_ray(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            record = await _start(launcher, ray_cluster, model)
            assert TOKEN not in Path(f"/proc/{record.pid}/cmdline").read_text()

    asyncio.run(scenario())
    launch = json.loads((model / "expert-0.launch").read_text())
    assert (launch["address"], launch["token"], launch["exit_with_parent"]) == ("127.0.0.1:0", TOKEN, False)
    assert launch["host_memory_bytes"] > 0
    environment = json.loads((model / "expert-0.environment").read_text())
    assert not [name for name in environment if name.startswith("RAY_")]
    assert TOKEN not in environment.values()
    assert environment.get("OMP_NUM_THREADS") != "1"  # as Ray would have it


@pytest.mark.usefixtures("processes")
def test_what_keeps_a_worker_from_starting_is_told(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            (model / "refusal").write_text("there is no room")
            with pytest.raises(WorkerLostError, match="there is no room"):
                await _start(launcher, ray_cluster, model)
            with pytest.raises(CheckpointError, match="is not on the node"):
                await _start(launcher, ray_cluster, model / "elsewhere")
            worker = PlacedWorker("expert", 0, "nowhere", "cpu", MEMORY_BYTES)
            with pytest.raises(UnavailableError, match="no live node nowhere"):
                await launcher.start(worker, _launch(worker, model))

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_worker_outlives_its_actor_and_its_raylet(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    node = ray_cluster.nodes[2]

    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            record = await _start(launcher, ray_cluster, model, node=2)
            before = await _actor_pid(launcher, ray_cluster, record)
            os.kill(before, signal.SIGKILL)
            await _eventually(lambda: launcher.is_running(record))
            assert await _actor_pid(launcher, ray_cluster, record) != before
            os.kill(_raylet_of(node), signal.SIGKILL)
            assert not has_ended(record.pid)
            await _eventually(lambda: _unavailable(launcher.is_running(record)))  # nobody can look there now
            ray_cluster.kill(node)
            ray_cluster.start(node)
            await _eventually(lambda: launcher.adopt(record))
            assert not has_ended(record.pid)
            await launcher.stop(record, kill=True)
            await _eventually(lambda: _not(launcher.is_running(record)))

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_new_launcher_finds_the_worker_and_ends_it_without_its_record(
    ray_cluster: RayCluster, settings: Settings, model: Path
) -> None:
    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            record = await _start(launcher, ray_cluster, model)
        async with _launcher(ray_cluster, settings) as launcher:
            assert await launcher.is_running(record)
            assert await launcher.end_all(5.0) == 1
            assert has_ended(record.pid)
            assert await launcher.end_all(5.0) == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_two_clusters_of_one_name_leave_each_others_workers_alone(
    ray_cluster: RayCluster, settings: Settings, model: Path
) -> None:
    elsewhere = settings.model_copy(update={"home": settings.home / "elsewhere"})

    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher, _launcher(ray_cluster, elsewhere) as other:
            await other.check_alone()
            record = await _start(launcher, ray_cluster, model)
            await launcher.check_alone()
            with pytest.raises(ConfigError, match=r"another cluster called .* \(expert-0\): choose another"):
                await other.check_alone()
            with pytest.raises(ConfigError, match="choose another --cluster-name"):
                await _start(other, ray_cluster, model)
            assert await other.end_all(5.0) == 0
            assert not has_ended(record.pid)
            assert await launcher.is_running(record)
            assert await launcher.end_all(5.0) == 1
            await other.check_alone()
            theirs = await _start(other, ray_cluster, model)
            assert await other.end_all(5.0) == 1
            assert has_ended(theirs.pid)

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_start_that_is_cancelled_leaves_nothing(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    async def scenario() -> None:
        (model / "gate").touch()
        pid_file = settings.home / "clusters" / settings.cluster_name / "logs" / "expert-0.pid"
        async with _launcher(ray_cluster, settings) as launcher:
            start = asyncio.create_task(_start(launcher, ray_cluster, model))
            await _eventually(lambda: _true(pid_file.exists() and pid_file.read_text() != ""))
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            pid = int(pid_file.read_text())
            await _eventually(lambda: _true(has_ended(pid)))

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_workers_and_launcher_outlive_rays_head(ray_cluster: RayCluster, settings: Settings, model: Path) -> None:
    """Away past the time after which raylets, actors and the driver give up; then back, and the worker is adopted."""

    async def scenario() -> None:
        async with _launcher(ray_cluster, settings) as launcher:
            record = await _start(launcher, ray_cluster, model)
            driver = launcher.bridge_pid
            assert driver is not None
            ray_cluster.kill(ray_cluster.head)
            await _eventually(lambda: _true(all(node.pid is None for node in ray_cluster.nodes)))
            await _eventually(lambda: _true(has_ended(driver)))
            assert not has_ended(record.pid)
            with pytest.raises(UnavailableError):
                await launcher.topology()
            for node in ray_cluster.nodes:
                ray_cluster.kill(node)
            ray_cluster.start()
            await _eventually(lambda: launcher.adopt(record))
            assert [node.id for node in (await launcher.topology()).nodes] == ray_cluster.names
            await launcher.stop(record, kill=False)
            await _eventually(lambda: _true(has_ended(record.pid)))

    asyncio.run(scenario())


@pytest.mark.usefixtures("processes")
def test_a_head_that_is_soon_back_finds_the_nodes_that_live(settings: Settings, model: Path) -> None:
    """Ray's own check takes them for a head that runs."""
    cluster = RayCluster(2, PATIENT_TIMEOUT_S)

    async def scenario() -> None:
        async with _launcher(cluster, settings) as launcher:
            record = await _start(launcher, cluster, model)
            node = cluster.nodes[1].pid
            await asyncio.to_thread(cluster.kill, cluster.head)
            await asyncio.to_thread(cluster.start, cluster.head)
            await _eventually(lambda: launcher.adopt(record))
            assert [node.id for node in (await launcher.topology()).nodes] == cluster.names
            assert cluster.nodes[1].pid == node
            assert await launcher.end_all(5.0) == 1
            assert has_ended(record.pid)

    try:
        cluster.start()
        asyncio.run(scenario())
    finally:
        cluster.close()


def test_without_ray_calls_fail_soon_and_say_why(settings: Settings) -> None:
    async def scenario() -> None:
        launcher = RayLauncher(settings, address="127.0.0.1:1", environment=os.environ)
        try:
            with pytest.raises(UnavailableError, match=r"nothing answers at 127\.0\.0\.1:1"):
                await launcher.topology()
        finally:
            await launcher.close()

    asyncio.run(scenario())


async def _true(value: bool) -> bool:
    return value


async def _not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def _unavailable(answer: Awaitable[bool]) -> bool:
    try:
        await answer
    except UnavailableError:
        return True
    return False


async def _actor_pid(launcher: RayLauncher, cluster: RayCluster, record: WorkerRecord) -> int:
    """The process of the worker's actor, the newest that there is: Ray names it after its class."""
    assert await launcher.is_running(record)
    return max(pid for pid in marked(cluster.run_id) if Path(f"/proc/{pid}/cmdline").read_text().startswith(ACTOR))
