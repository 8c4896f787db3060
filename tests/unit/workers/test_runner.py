"""The engine's thread: what it does with a fault of ours."""

from __future__ import annotations

import threading

import pytest

from cluster.protocol import EngineState, StepOutput
from workers.runner import EngineRunner


class BrokenEngine:
    """An engine whose scheduler raises: the state can no longer be trusted."""

    has_work = True

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
