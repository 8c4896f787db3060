"""What a controller orders, and how it is carried out: experts to hold (`Assign`), ways to experts (`Route`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from cluster.errors import ConfigError, ForetokenError
from cluster.protocol import Assign, Route, WorkerReport

if TYPE_CHECKING:
    from workers.experts.host import ExpertHost
    from workers.experts.routed import RoutedExperts

log = logging.getLogger(__name__)


class Subject(Protocol):
    """What a controller steers: the experts that a worker holds, or the routes that it takes."""

    def carry_out(self, order: Assign | Route) -> None:
        """May take long. Raises a `ForetokenError` that says why it could not be done."""

    def reported(self, report: WorkerReport) -> WorkerReport:
        """`report` with what there is to say of this subject."""

    def forget_versions(self) -> None:
        """Another controller counts from here on: an order of the last one has no version any more."""


class Orders:
    """Carries out orders on a thread of its own, one after the other; of those that wait the newest wins."""

    def __init__(self, carry_out: Callable[[Assign | Route], None], on_done: Callable[[], None]) -> None:
        """`on_done` is called on that thread after each order, done or failed."""
        self.error: str | None = None  # why the last order failed; None as long as it may not
        self._carry_out = carry_out
        self._on_done = on_done
        self._next: Assign | Route | None = None
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def put(self, order: Assign | Route) -> None:
        with self._wake:
            self._next, self.error = order, None
            self._wake.notify()

    def drop(self) -> None:
        """Forget what waits."""
        with self._wake:
            self._next = self.error = None

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._next is not None)
                order, self._next = self._next, None
            if order is None:
                continue
            error = self._try(order)
            with self._wake:
                if self._next is None:
                    self.error = error
            self._on_done()

    def _try(self, order: Assign | Route) -> str | None:
        try:
            self._carry_out(order)
        except ForetokenError as error:
            log.error("%s %d was not carried out: %s", type(order).__name__, order.version, error.message)
            return error.message
        except Exception as error:
            log.exception("%s %d was not carried out", type(order).__name__, order.version)
            return f"{type(error).__name__}: {error}"
        return None


class _Versions:
    """The version of the last order that is in effect, where the controller of today gave it: versions are its own."""

    def __init__(self) -> None:
        self.reign = 0
        self._done = (0, 0)  # reign, version

    def done(self, reign: int, version: int) -> None:
        self._done = (reign, version)

    @property
    def current(self) -> int:
        reign, version = self._done
        return version if reign == self.reign else 0


class HeldExperts:
    """The subject of an expert worker: what it holds."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host
        self._versions = _Versions()

    def carry_out(self, order: Assign | Route) -> None:
        if not isinstance(order, Assign):
            raise ConfigError("an expert worker takes assignments, no routes: look at its role", param="role")
        reign = self._versions.reign
        self._host.assign(order.experts)
        self._versions.done(reign, order.version)

    def forget_versions(self) -> None:
        self._versions.reign += 1

    def reported(self, report: WorkerReport) -> WorkerReport:
        version = self._versions.current  # before the experts: an acknowledged assignment is never half there
        return msgspec.structs.replace(report, assign_version=version, experts=self._host.experts)


class TakenRoutes:
    """The subject of an attention worker: where it finds experts."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self._versions = _Versions()

    def carry_out(self, order: Assign | Route) -> None:
        if not isinstance(order, Route):
            raise ConfigError("an attention worker takes routes, no assignments: look at its role", param="role")
        reign = self._versions.reign
        self._experts.set_route(order)
        self._versions.done(reign, order.version)

    def forget_versions(self) -> None:
        self._versions.reign += 1

    def reported(self, report: WorkerReport) -> WorkerReport:
        # The peers belong to the route in effect, which may be newer than the version: said too early, none is missed.
        version = self._versions.current
        return msgspec.structs.replace(
            report,
            route_version=version,
            lost_peers=self._experts.lost_peers,
            error=report.error or self._experts.refusal,
        )
