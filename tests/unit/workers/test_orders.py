"""What becomes of a controller's orders on both kinds of worker."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cluster.errors import ConfigError
from cluster.protocol import Assign, Route, WorkerReport
from workers.orders import HeldExperts, TakenRoutes

REPORT = WorkerReport(worker_id="w", name="x", epoch=1)
EXPERTS = ((0, 2), ())


class FakeHost:
    experts: tuple[tuple[int, ...], ...] = ()
    failure: Exception | None = None
    meanwhile: Any = None

    def assign(self, experts: tuple[tuple[int, ...], ...]) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        if self.failure is not None:
            raise self.failure
        self.experts = experts


class FakeRouted:
    lost_peers: tuple[str, ...] = ()
    refusal: str | None = None
    routes: tuple[int, ...] = ()
    failure: Exception | None = None
    meanwhile: Any = None

    def set_route(self, route: Route) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        if self.failure is not None:
            raise self.failure
        self.routes += (route.version,)


def route(version: int) -> Route:
    return Route(version=version, peers=(), owners=())


def held() -> tuple[HeldExperts, FakeHost]:
    host = FakeHost()
    return HeldExperts(host), host  # type: ignore[arg-type]


def taken() -> tuple[TakenRoutes, FakeRouted]:
    routed = FakeRouted()
    return TakenRoutes(routed), routed  # type: ignore[arg-type]


def test_an_assignment_is_reported_when_it_is_in_effect() -> None:
    subject, host = held()
    host.failure = ConfigError("no room")
    with pytest.raises(ConfigError):
        subject.carry_out(Assign(version=3, experts=EXPERTS))
    assert subject.reported(REPORT).assign_version == 0
    host.failure = None
    subject.carry_out(Assign(version=4, experts=EXPERTS))
    report = subject.reported(REPORT)
    assert (report.assign_version, report.experts) == (4, EXPERTS)


def test_another_controllers_assignment_has_no_version_but_its_experts_are_there() -> None:
    subject, host = held()
    host.meanwhile = subject.forget_versions  # it takes over while the experts are loaded
    subject.carry_out(Assign(version=9, experts=EXPERTS))
    report = subject.reported(REPORT)
    assert (report.assign_version, report.experts) == (0, EXPERTS)


def test_a_route_is_reported_when_it_is_in_effect() -> None:
    subject, routed = taken()
    routed.failure = ConfigError("no such layer")
    with pytest.raises(ConfigError):
        subject.carry_out(route(4))
    assert subject.reported(REPORT).route_version == 0
    routed.failure, routed.lost_peers = None, ("gone",)
    subject.carry_out(route(5))
    report = subject.reported(REPORT)
    assert (report.route_version, report.lost_peers, report.error) == (5, ("gone",), None)
    routed.refusal = "expert-1 is unlike"
    assert subject.reported(REPORT).error == "expert-1 is unlike"
    failed = msgspec.structs.replace(REPORT, error="no such layer")
    assert subject.reported(failed).error == "no such layer"


def test_two_controllers_that_count_alike_are_told_apart() -> None:
    subject, routed = taken()
    subject.carry_out(route(1))
    subject.forget_versions()
    assert subject.reported(REPORT).route_version == 0
    routed.meanwhile = lambda: reported.append(subject.reported(REPORT).route_version)
    reported: list[int] = []
    subject.carry_out(route(1))
    assert (reported, subject.reported(REPORT).route_version) == ([0], 1)


def test_each_role_takes_its_own_orders() -> None:
    with pytest.raises(ConfigError, match="no routes"):
        held()[0].carry_out(route(1))
    with pytest.raises(ConfigError, match="no assignments"):
        taken()[0].carry_out(Assign(version=1, experts=()))
