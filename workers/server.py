"""`python -m workers.server`: serves one engine, or some experts, over gRPC. Holds no decisions.

Its options are one `Launch` message, JSON, on the first line of standard input. It answers `State` once it serves;
SIGTERM lets what runs finish, a second signal ends it at once. A child of its launcher (`exit_with_parent`) ends with
standard input; any other worker outlives whoever started it, and ends when its controller stays away (`Lease`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
import msgspec

from cluster.errors import ConfigError, ForetokenError
from cluster.files import write_whole
from cluster.protocol import KEEPALIVE, SERVICE, Announcement, EngineState, Launch, WorkerReport
from workers.auth import TokenCheck, VersionCheck
from workers.build import BuiltEngine, BuiltExperts, build_engine, build_expert_host
from workers.console import loading_progress, set_up_logging
from workers.control import ControlService
from workers.experts.exchange import LinkServer
from workers.lease import Lease
from workers.links import ExpertService, link_opener
from workers.orders import HeldExperts, Subject, TakenRoutes
from workers.streams import StreamService

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
MEET_PATIENCE = 2.0  # in `peer_timeout_s`: a peer that was offered a link reads the offer, then comes
DRAIN_POLL_S = 0.02
GRACE_S = 0.2  # for calls under way when the server stops
# The event loop and the engine share an interpreter: a waiting engine thread must not wait the default 5 ms for it.
SWITCH_INTERVAL_S = 0.0005

_encode = msgspec.msgpack.Encoder().encode


class Service(Protocol):
    """What a worker does: run requests (`StreamService`), or experts for those who do (`ExpertService`)."""

    def handlers(self) -> Mapping[str, Any]: ...

    def start(self) -> None: ...

    def state(self) -> EngineState: ...

    def drain(self) -> None: ...

    @property
    def idle(self) -> bool: ...

    async def close(self) -> None: ...


class Worker:
    """One worker's server, from its start to its end."""

    def __init__(self, launch: Launch, built: BuiltEngine | BuiltExperts) -> None:
        self._launch = launch
        self._worker_id = uuid.uuid4().hex
        self._address = launch.address
        self._lease = Lease(launch.orphan_timeout_s, "no controller was heard of for {:g} s (orphan_timeout_s)")
        self._loop = asyncio.get_running_loop()
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        self._service: Service
        self._control: ControlService | None = None
        if isinstance(built, BuiltExperts):
            links = LinkServer(launch.tensor_host, MEET_PATIENCE * launch.peer_timeout_s)
            self._service = ExpertService(built.host, built.likeness, links, self._worker_id)
            self._control = self._controlled(HeldExperts(built.host))
        else:
            streams = self._service = StreamService(built, launch, self._worker_id)
            if built.experts is not None:
                self._control = self._controlled(TakenRoutes(built.experts))
                built.experts_changed.listen(streams.runner.wake)
                built.experts_changed.listen(self._control.notify)

    def _controlled(self, subject: Subject) -> ControlService:
        return ControlService(subject, self._lease, report=self._report, heartbeat_s=self._launch.heartbeat_s)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then let what runs finish for `drain_timeout_s`.

        Raises `ConfigError` where the address cannot be had, or nothing can be written to `announce_path`.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled)
        server = self._server()
        self._service.start()
        await server.start()
        try:
            self._lease.start()
            self._announce()
            await self._stop.wait()
            self._service.drain()
            deadline = self._loop.time() + self._launch.drain_timeout_s
            while not self._service.idle and not self._now.is_set() and self._loop.time() < deadline:
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            await server.stop(grace=GRACE_S)
            await self._service.close()

    def _signalled(self) -> None:
        (self._now if self._stop.is_set() else self._stop).set()

    def _server(self) -> grpc.aio.Server:
        """A server on our address, not started; the port is known after this."""
        launch = self._launch
        checks: list[grpc.aio.ServerInterceptor] = [VersionCheck(launch.name or launch.role)]
        if launch.token is not None:
            checks.insert(0, TokenCheck(launch.token))
        server = grpc.aio.server(
            interceptors=checks,
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0), *KEEPALIVE],
        )
        handlers = {
            **self._service.handlers(),
            **(self._control.handlers() if self._control is not None else {}),
            "State": grpc.unary_unary_rpc_method_handler(self._state, response_serializer=_encode),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            port = server.add_insecure_port(launch.address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {launch.address}: {error}", param="address") from error
        if not launch.address.startswith("unix:"):
            self._address = f"{launch.address.rpartition(':')[0]}:{port}"
        return server

    async def _state(self, _request: bytes, _context: object) -> EngineState:
        return self._service.state()

    def _report(self) -> WorkerReport:
        return WorkerReport(
            worker_id=self._worker_id,
            name=self._launch.name,
            epoch=0,
            state=self._service.state(),
        )

    def _announce(self) -> None:
        if self._launch.announce_path is not None:
            announcement = Announcement(pid=os.getpid(), address=self._address, worker_id=self._worker_id)
            try:
                write_whole(Path(self._launch.announce_path), msgspec.json.encode(announcement))
            except OSError as error:
                raise ConfigError(
                    f"cannot write {self._launch.announce_path}: {error.strerror}", param="announce_path"
                ) from error


def build(launch: Launch) -> BuiltEngine | BuiltExperts:
    """What the worker's role asks for. Raises `ConfigError` and `CheckpointError`."""
    if launch.role == "expert":
        return build_expert_host(launch)
    opener = functools.partial(link_opener, launch) if launch.role == "attention" else None
    return build_engine(launch, loading_progress(launch), link_opener=opener)


async def _run(launch: Launch, built: BuiltEngine | BuiltExperts) -> None:
    await Worker(launch, built).run()


def _watch_parent() -> None:
    """End the process when standard input ends: whoever started it is gone, and nobody else would."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    line = _read_line()
    launch = msgspec.json.decode(line, type=Launch)
    set_up_logging(launch.log_level, launch.log_format)
    if launch.exit_with_parent:
        _watch_parent()
    else:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # its launcher's terminal may close
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        asyncio.run(_run(launch, build(launch)))
    except ForetokenError as error:
        # One line that the launcher shows as it is; a traceback would hide what the user can do. The code says to it
        # that another try would end in the same way.
        code = f"{error.code}: " if isinstance(error, ConfigError) else ""
        print(f"error: {code}{error.message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    if launch.role != "all":
        _exit()


def _exit() -> NoReturn:
    """End without the interpreter's own end: threads that wait inside gloo for a peer would not outlive it in peace."""
    logging.shutdown()
    os._exit(0)


def _read_line() -> bytes:
    """The first line of standard input, read unbuffered: what follows belongs to whoever watches the pipe."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
