"""`foretoken cluster up`: starts the processes of a cluster, keeps them up, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from cluster import logs
from cluster.config import ENV_PREFIX, Settings
from cluster.control.last_known import LastKnown
from cluster.control.model import find_model
from cluster.control.ray_launcher import RayLauncher
from cluster.control.worker_folders import MAX_SOCKET_PARENT
from cluster.environment import MARK, child_environment, ray_variables
from cluster.errors import (
    ConfigError,
    DeadlineError,
    StoreUnavailableError,
    UnavailableError,
    UnreadableValueError,
    WorkerLostError,
)
from cluster.event_loop import loop_factory
from cluster.machine import free_port, this_machine
from cluster.operate.children import GRACE_S, Child, sweep
from cluster.operate.coming_up import ComingUp, Sight
from cluster.operate.controller import PULSE_NAME, hung_after_s
from cluster.operate.foreground import LOST, run_behind
from cluster.operate.leftovers import clean_up, end_workers, kill_workers
from cluster.operate.pulse import end_unanswering, end_without_beat
from cluster.operate.ray_nodes import access, is_started, node_children, node_environment, tuned_variables
from cluster.operate.redis_server import is_answering, redis_child
from cluster.operate.show import announce_cluster
from cluster.operate.state_file import ClusterFiles, KeptState, SupervisorState
from cluster.serve import (
    EXIT_AT_ONCE,
    HTTP_STOP_TIMEOUT_S,
    SIGNALS,
    WORKER_STOP_TIMEOUT_S,
    base_url,
    listen,
    with_keys,
)
from cluster.store import open_store
from cluster.store.base import Store
from cluster.store.records import ClusterStatus, read_lead, read_status

logger = logging.getLogger(__name__)

POLL_S = 0.1
SAME_SIGNAL_S = 0.5  # one order may come twice: `timeout` signals its child, then the child's whole group
PROBE_TIMEOUT_S = 2.0
RETRY_S = 1.0  # after a fault of our own
SECRET_BYTES = 32
FOLDER_PREFIX = "ft-"  # short: sockets lie below it


def run(settings: Settings) -> int:
    """Keep a cluster up until a signal; returns the exit code. Raises `ForetokenError` for what stands in the way."""
    if sys.platform != "linux":
        raise ConfigError(
            "clusters through Ray run on Linux only; here `foretoken serve` serves a model from one process"
        )
    logs.configure(settings.log_level, settings.log_format)
    started = time.monotonic()
    with listen(settings.host, settings.port) as listener:  # a port in use fails before anything is started
        url, port = base_url(listener), listener.getsockname()[1]
        settings = with_keys(settings, listener)
    model = find_model(settings)  # fetched here, with progress; the others find it
    token = settings.token or _new_secret()
    found = {"served_model_name": model.name, "port": port, "token": token}
    if settings.model is not None:
        found |= {"model": str(model.path), "revision": None}
    settings = settings.model_copy(update=found)
    files = ClusterFiles(settings)

    def work(orders: int) -> int:
        with files.held(), asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_Supervisor(settings, files, url).run(orders, started))

    code = run_behind(work)
    if code == LOST:
        with files.held(GRACE_S):
            clean_up(files)
        raise WorkerLostError("the cluster's supervisor was killed; what it had started has been ended")
    return code


def settings_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, for our own processes."""
    environment = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        text = str(value).lower() if isinstance(value, bool) else str(int(value) if isinstance(value, int) else value)
        environment[ENV_PREFIX + name.upper()] = text
    return environment


class _Supervisor:
    """The children of one `cluster up`, from their start to their end."""

    def __init__(self, settings: Settings, files: ClusterFiles, url: str) -> None:
        self._settings = settings
        self._files = files
        self._url = url
        self._run_id = secrets.token_hex(8)
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_short_folder()))
        self._stop = asyncio.Event()
        self._stopped_at = 0.0
        self._is_at_once = False
        self._children: list[Child] = []
        self._mark = {MARK: self._run_id}
        self._ray = ray_variables(os.environ)  # of the Ray that is joined
        self._store_url = settings.store or SecretStr("")
        self._kept = KeptState(files, self._state)

    async def run(self, orders: int, started: float) -> int:
        """Until an order comes; raises `ForetokenError` where the cluster cannot be started."""
        loop = asyncio.get_running_loop()
        loop.add_reader(orders, self._take_order, orders)
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        store: Store | None = None
        try:
            await asyncio.to_thread(clean_up, self._files)
            begun = asyncio.create_task(self._begin())
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({begun, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not begun.done():
                logger.info("stopping what has been started")
                begun.cancel()
                await asyncio.gather(begun, return_exceptions=True)
                return 0
            store, status = await begun
            announce_cluster(status, self._url, self._settings, self._files.logs, time.monotonic() - started)
            keepers = [asyncio.create_task(self._go_on(child.keep_up)) for child in self._children]
            watchers = [asyncio.create_task(self._go_on(watch)) for watch in self._watches()]
            await stopped
            logger.info(
                "stopping: what runs may take %g s more; a second signal ends at once", self._settings.drain_timeout_s
            )
            await self._stop_all()
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*keepers)
            await asyncio.gather(*watchers, return_exceptions=True)
            return 0
        finally:
            try:
                if store is not None:
                    await store.close()
                if not self._is_at_once:
                    await self._stop_all()
            finally:
                self._end()  # not awaited: a second signal ends whatever is waited for here

    async def _go_on(self, run: Callable[[], Awaitable[None]]) -> None:
        """Whatever went wrong, a part of this command never ends unseen while the others go on."""
        while True:
            try:
                return await run()
            except Exception:
                logger.exception("a part of this command failed; it goes on")
            await asyncio.sleep(RETRY_S)

    def _watches(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """What ends each child that hangs; a controller's successor leads before the workers miss it."""
        patience_s = hung_after_s(self._settings)
        for child in self._children:
            if child.name == "controller":
                yield partial(end_without_beat, child, self._folder / PULSE_NAME, patience_s)
            elif child.is_answering is not None:
                yield partial(end_unanswering, child, child.is_answering, patience_s)

    def _take_order(self, orders: int) -> None:
        """A signal that the foreground got, or its end."""
        if os.read(orders, 1):
            self._on_signal()
            return
        asyncio.get_running_loop().remove_reader(orders)
        self._stop.set()

    def _on_signal(self) -> None:
        now = time.monotonic()
        if not self._stop.is_set():
            self._stop.set()
            self._stopped_at = now
        elif now - self._stopped_at > SAME_SIGNAL_S and not self._is_at_once:
            self._is_at_once = True
            raise SystemExit(EXIT_AT_ONCE)  # out of the event loop

    def _end(self) -> None:
        """Whatever is left of this cluster on this machine ends now."""
        kill_workers(self._files)
        sweep(self._run_id, str(self._folder))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._kept.close()
        self._files.remove()

    # ------------------------------------------------------------------------------------------------------ starting

    async def _begin(self) -> tuple[Store, ClusterStatus]:
        """Everything started and serving. Raises `ForetokenError` with the last lines of who failed."""
        deadline = time.monotonic() + self._settings.start_timeout_s
        nodes: list[Child] = []
        if self._settings.local is None:
            await self._find_ray()
        else:
            nodes = self._local_nodes(self._settings.local)
        before: ClusterStatus | None = None
        if self._settings.store is not None:
            before = await check_store(self._settings.store, self._settings.cluster_name)
        else:
            logger.info("starting redis-server")
            environment = child_environment(os.environ, self._mark)
            redis, self._store_url = redis_child(
                self._folder, _new_secret(), self._files.logs / "redis.log", environment
            )
            self._add(redis)
            await self._until(lambda: is_answering(self._folder), deadline, "redis")
        gateway, controller = (self._command(name) for name in ("gateway", "controller"))
        logger.info("starting %s", f"Ray (nodes: {len(nodes)}) and the gateway" if nodes else "the gateway")
        self._add(*nodes[:1], gateway)
        await self._until(lambda: all(map(is_started, nodes[:1])), deadline, "Ray's head")
        self._add(*nodes[1:])
        await self._until(lambda: all(map(is_started, nodes)), deadline, "Ray's nodes")
        logger.info("starting the controller, which has the workers started")
        self._add(controller)
        store = open_store(self._store_url.get_secret_value(), namespace=self._settings.cluster_name)
        try:
            return store, await self._until_serving(store, ComingUp(self._settings, before), deadline)
        except BaseException:
            await store.close()
            raise

    async def _find_ray(self) -> None:
        """Raises `ConfigError` where no Ray runs that could be joined, or another cluster has this name there."""
        launcher = RayLauncher(self._settings)
        try:
            topology = await launcher.topology()
            with contextlib.suppress(StoreUnavailableError):  # `check_store` comes next, and says so
                await launcher.check_alone()
        except UnavailableError as error:
            raise ConfigError(
                f"{error.message}. Start Ray nodes on this machine with --local N, or set RAY_ADDRESS to a Ray that "
                "runs (and RAY_AUTH_MODE=token with its RAY_AUTH_TOKEN where it wants a token)",
                param="local",
            ) from None
        finally:
            await launcher.close()
        logger.info("Ray has %d nodes: %s", len(topology.nodes), ", ".join(node.id for node in topology.nodes))

    def _local_nodes(self, num_nodes: int) -> list[Child]:
        port = free_port()
        token = _new_secret().get_secret_value()
        environment = node_environment(os.environ, token=token, folder=self._folder, mark=self._mark)
        self._ray = {**tuned_variables(os.environ), **access(token), "RAY_ADDRESS": f"127.0.0.1:{port}"}
        return node_children(
            num_nodes,
            port=port,
            folder=self._folder,
            logs=self._files.logs,
            environment=environment,
            machine=this_machine(),
        )

    def _command(self, name: str) -> Child:
        """One of our own processes, which gets every setting."""
        command = [sys.executable, "-P", "-m", "cluster.cli", "cluster", name]
        if name == "controller":
            command += ["--folder", str(self._folder)]
        keys = {} if name == "gateway" else dict.fromkeys(("api_key", "api_key_file", "admin_api_key"))
        settings = self._settings.model_copy(update={"store": self._store_url, **keys})
        given = settings_environment(settings) | self._mark
        if name == "controller":  # the gateway has nothing to do with Ray
            given |= self._ray
        environment = child_environment(os.environ, given)
        drain_s = self._settings.drain_timeout_s + HTTP_STOP_TIMEOUT_S + GRACE_S
        child = Child(name, command, environment, self._files.logs / f"{name}.log", grace_s=drain_s)
        if name == "gateway":
            child.is_answering = lambda timeout_s: asyncio.to_thread(is_live, self._url, timeout_s)
        return child

    def _add(self, *children: Child) -> None:
        for child in children:
            child.on_change = self._kept.write
            self._children.append(child)
            child.start()

    def _state(self) -> SupervisorState:
        return SupervisorState(
            pid=os.getpid(),
            run_id=self._run_id,
            folder=str(self._folder),
            url=self._url,
            store=self._store_url.get_secret_value(),
            drain_timeout_s=self._settings.drain_timeout_s,
            children={child.name: pid for child in self._children if (pid := child.pid) is not None},
        )

    async def _until(self, is_done: Callable[[], bool], deadline: float, what: str) -> None:
        while not is_done():
            for child in self._children:
                child.check()
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{what} was not ready after {self._settings.start_timeout_s:g} s (start_timeout_s); "
                    f"see the logs in {self._files.logs}"
                )
            await asyncio.sleep(POLL_S)

    async def _until_serving(self, store: Store, coming_up: ComingUp, deadline: float) -> ClusterStatus:
        """Until the controller says that every worker serves, and the gateway that it can be used.

        Raises what `ComingUp` does.
        """
        last_known = LastKnown(self._folder)
        while True:
            for child in self._children:
                child.check()
            status: ClusterStatus | None = None
            with contextlib.suppress(StoreUnavailableError, UnreadableValueError):  # the controller writes them anew
                status, lead = await read_status(store), await read_lead(store)
                known = last_known.read()
                sight = Sight(status, lead, known.lead.controller_id if known is not None else None)
                if status is not None and coming_up.is_serving(sight) and await asyncio.to_thread(is_ready, self._url):
                    return status
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the cluster was not ready after {self._settings.start_timeout_s:g} s (start_timeout_s): "
                    f"{coming_up.problem or 'nothing is known to be wrong'}; see the logs in {self._files.logs}"
                )
            await asyncio.sleep(POLL_S)

    # ------------------------------------------------------------------------------------------------------ stopping

    async def _stop_all(self) -> None:
        """What runs finishes, and meanwhile everything is kept up; then the controller ends the workers. Idempotent."""
        running = {child.name: child for child in self._children if child.pid is not None}
        for name in ("gateway", "controller"):
            if name in running:
                await running[name].stop()
        if running:
            await end_workers(self._settings, self._files, WORKER_STOP_TIMEOUT_S)  # those that it could not reach
        await asyncio.gather(*(child.stop() for child in self._children))


async def check_store(url: SecretStr, cluster_name: str) -> ClusterStatus | None:
    """The status that an earlier cluster of that name left there, if any that can be read.

    Raises `ConfigError` where the store that was given cannot be used now: nothing would ever serve.
    """
    store = open_store(url.get_secret_value(), namespace=cluster_name)
    try:
        return await read_status(store)
    except UnreadableValueError as error:
        logger.warning("%s", error.message)
        return None
    except StoreUnavailableError as error:
        raise ConfigError(
            f"{error.message} Start it or mend its url (store); without one `cluster up` starts a Redis of its own",
            param="store",
        ) from None
    finally:
        await store.close()


def is_ready(url: str) -> bool:
    """Whether the gateway there can be used. Blocks."""
    return _status_of(url, "/health/ready", PROBE_TIMEOUT_S) == http.HTTPStatus.OK


def is_live(url: str, timeout_s: float) -> bool:
    """Whether the gateway there answers, as it does while it drains or has no worker. Blocks."""
    return _status_of(url, "/health/live", timeout_s) is not None


def _status_of(url: str, path: str, timeout_s: float) -> int | None:
    """None: no answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _short_folder() -> str:
    """Where sockets fit, whatever the temporary folder is called."""
    parent = tempfile.gettempdir()
    return parent if len(parent) <= MAX_SOCKET_PARENT // 4 else "/tmp"


def _new_secret() -> SecretStr:
    """One that nothing else is, and nothing else follows from."""
    return SecretStr(secrets.token_hex(SECRET_BYTES))
