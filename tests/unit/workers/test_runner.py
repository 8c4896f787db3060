"""The engine's thread: what it does with a fault of ours, and while experts are out of reach."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from cluster.errors import ForetokenError
from cluster.protocol import EngineState, Finish, RequestOutput, StepOutput
from workers.lease import Lease
from workers.runner import IDLE_WAIT_S, EngineRunner

DEADLINE_S = 30.0


class BrokenEngine:
    """An engine whose scheduler raises: the state can no longer be trusted."""

    has_work = True
    stalled = False

    def step(self) -> StepOutput:
        raise RuntimeError("a broken invariant")

    def snapshot(self) -> EngineState:
        return EngineState()


def test_a_fault_on_the_engines_thread_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    died = threading.Event()
    runner = EngineRunner(BrokenEngine(), lambda _: None, die=died.set)  # type: ignore[arg-type]
    runner.start()
    assert died.wait(30), "nobody noticed"
    assert "the engine's thread failed" in caplog.text
    assert runner.stop(30)


class StuckEngine:
    """An engine whose step does not come back before it is told to."""

    has_work = True
    stalled = False

    def __init__(self) -> None:
        self.steps = threading.Event()
        self.gate = threading.Event()

    def step(self) -> StepOutput:
        self.steps.set()
        self.gate.wait(DEADLINE_S)
        return StepOutput()

    def tend(self) -> StepOutput:
        return StepOutput()

    def snapshot(self) -> EngineState:
        return EngineState()


def test_a_step_that_hangs_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    died = threading.Event()
    engine = StuckEngine()
    turns = Lease(0.3, "the engine's thread did not come round for {:g} s", died.set)
    runner = EngineRunner(engine, lambda _: None, turns=turns)  # type: ignore[arg-type]
    started = time.monotonic()
    runner.start()
    assert died.wait(DEADLINE_S), "nobody noticed"
    assert time.monotonic() - started >= 0.3
    assert "the engine's thread did not come round for 0.3 s: this worker ends itself" in caplog.text
    engine.gate.set()
    assert runner.stop(DEADLINE_S)


def test_a_long_step_that_gets_on_is_no_hang() -> None:
    engine = StuckEngine()
    died: list[float] = []
    turns = Lease(0.5, "", lambda: died.append(time.monotonic()))
    runner = EngineRunner(engine, lambda _: None, turns=turns)  # type: ignore[arg-type]
    runner.start()
    assert engine.steps.wait(DEADLINE_S)
    started = time.monotonic()
    while time.monotonic() - started < 1.5:
        assert not died
        turns.renew()
        time.sleep(0.01)
    engine.gate.set()
    assert runner.stop(DEADLINE_S)


@pytest.mark.parametrize("has_work", [False, True], ids=["idle", "waits-for-experts"])
def test_who_waits_does_not_hang_and_who_has_ended_is_left_alone(has_work: bool) -> None:
    engine = StuckEngine()
    engine.has_work = has_work
    died: list[float] = []
    runner = EngineRunner(
        engine,  # type: ignore[arg-type]
        lambda _: None,
        can_step=lambda: False,
        turns=Lease(2 * IDLE_WAIT_S, "", lambda: died.append(time.monotonic())),
    )
    before = threading.active_count()
    runner.start()
    time.sleep(6 * IDLE_WAIT_S)  # that nothing happens can only be seen by waiting
    assert not died
    assert runner.stop(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while threading.active_count() > before:  # the watch ends with what it watches
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not died


@dataclass
class Submitted:
    request_id: str


class ScriptedEngine:
    """Requests that end at their first step; `stalls` makes steps stall."""

    def __init__(self) -> None:
        self.stalls = False
        self.stalled = False
        self.num_steps = 0
        self.num_tends = 0
        self.arrivals: dict[str, float] = {}
        self._outputs: list[RequestOutput] = []

    @property
    def has_work(self) -> bool:
        return bool(self.arrivals or self._outputs)

    def submit(self, request: Submitted) -> None:
        self.arrivals[request.request_id] = time.monotonic()

    def abort(self, request_id: str) -> None:
        if self.arrivals.pop(request_id, None) is not None:
            self._say(request_id, Finish(reason="abort"))

    def give_up(self, arrived_by: float, error: ForetokenError) -> None:
        for name in [name for name, arrival in self.arrivals.items() if arrival <= arrived_by]:
            del self.arrivals[name]
            self._say(name, Finish(reason="error", error_code=error.code, error_message=error.message))

    def step(self) -> StepOutput:
        self.num_steps += 1
        self.stalled = self.stalls and bool(self.arrivals)
        if not self.stalled:
            for name in list(self.arrivals):
                del self.arrivals[name]
                self._say(name, Finish(reason="stop"))
        return self._collect()

    def tend(self) -> StepOutput:
        self.num_tends += 1
        return self._collect()

    def snapshot(self) -> EngineState:
        return EngineState()

    def _say(self, name: str, finish: Finish) -> None:
        self._outputs.append(RequestOutput(request_id=name, index=0, finish=finish))

    def _collect(self) -> StepOutput:
        outputs, self._outputs = self._outputs, []
        return StepOutput(outputs=outputs)


class Case:
    """A runner around a scripted engine, and what it published."""

    def __init__(self, reroute_timeout_s: float = DEADLINE_S) -> None:
        self.engine = ScriptedEngine()
        self.ready = False
        self.finishes: dict[str, Finish] = {}
        self._changed = threading.Condition()
        self.runner = EngineRunner(
            self.engine,  # type: ignore[arg-type]
            self._publish,
            can_step=lambda: self.ready,
            reroute_timeout_s=reroute_timeout_s,
        )
        self.runner.start()

    def _publish(self, output: StepOutput) -> None:
        with self._changed:
            for item in output.outputs:
                assert item.finish is not None
                assert item.request_id not in self.finishes
                self.finishes[item.request_id] = item.finish
            self._changed.notify_all()

    def submit(self, name: str) -> None:
        self.runner.submit(Submitted(name))  # type: ignore[arg-type]

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        self.runner.wake()

    def end_of(self, name: str) -> Finish:
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.finishes, DEADLINE_S)
        return self.finishes[name]

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def case() -> Iterator[Case]:
    found = Case()
    yield found
    assert found.runner.stop(DEADLINE_S)


def test_requests_wait_for_the_first_route_and_can_be_aborted_meanwhile(case: Case) -> None:
    for name in ("x", "y"):
        case.submit(name)
    case.runner.abort("y")
    assert case.end_of("y").reason == "abort"
    assert case.engine.num_steps == 0
    assert not case.runner.idle
    case.set_ready(True)
    assert case.end_of("x").reason == "stop"
    case.until(lambda: case.runner.idle)


def test_a_drain_waits_for_what_waits_for_experts(case: Case) -> None:
    case.submit("x")
    case.until(lambda: "x" in case.engine.arrivals)
    case.runner.drain()
    case.submit("y")
    assert case.end_of("y").error_code == "draining"
    assert not case.runner.idle
    case.set_ready(True)
    assert case.end_of("x").reason == "stop"
    case.until(lambda: case.runner.idle)


def test_a_stalled_step_is_tried_again_when_experts_are_back(case: Case) -> None:
    case.engine.stalls = True
    case.set_ready(True)
    case.submit("x")
    case.until(lambda: case.engine.stalled)
    case.set_ready(False)
    case.until(lambda: case.engine.num_tends > 0)
    case.engine.stalls = False
    case.set_ready(True)
    assert case.end_of("x").reason == "stop"


def test_a_stall_does_not_spin() -> None:
    case = Case()
    case.engine.stalls = True
    case.set_ready(True)  # and stays so, which a real backend's does not
    case.submit("x")
    case.until(lambda: case.engine.num_steps >= 3)
    assert case.engine.num_steps < 20
    assert case.runner.stop(DEADLINE_S)


@pytest.mark.parametrize("stays_ready", [False, True])
def test_requests_end_with_peer_lost_once_experts_stay_away_too_long(stays_ready: bool) -> None:
    case = Case(reroute_timeout_s=0.3)
    case.engine.stalls = True
    case.set_ready(True)
    case.submit("x")
    case.until(lambda: case.engine.stalled)
    started = time.monotonic()
    if not stays_ready:
        case.set_ready(False)
    finish = case.end_of("x")
    assert (finish.reason, finish.error_code) == ("error", "peer_lost")
    assert 0.2 < time.monotonic() - started < 5.0
    arrived = time.monotonic()
    case.submit("y")
    assert case.end_of("y").error_code == "peer_lost"
    assert time.monotonic() - arrived > 0.25, "who comes later waits as long"
    case.engine.stalls = False
    case.set_ready(True)
    case.submit("z")
    assert case.end_of("z").reason == "stop"
    assert case.runner.stop(DEADLINE_S)


def test_before_the_first_route_nobody_is_given_up() -> None:
    case = Case(reroute_timeout_s=0.0)
    case.submit("x")
    case.until(lambda: case.engine.num_tends >= 3)
    assert "x" not in case.finishes
    case.set_ready(True)
    assert case.end_of("x").reason == "stop"
    assert case.runner.stop(DEADLINE_S)
