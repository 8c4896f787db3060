"""`make cluster-demo` with real processes: all of it, and an interrupt in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import load
from cluster.operate.children import marked
from cluster.operate.state_file import ClusterFiles, SupervisorState
from tests.support.cluster_up import clean_environment, wait_state

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240.0


class Running:
    def __init__(self, home: Path) -> None:
        self.files = ClusterFiles(load({"home": home, "cluster_name": "demo"}))
        self._log = home / "demo.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loadtests.cluster_demo"],
                cwd=ROOT,
                env=clean_environment(home),
                stdout=log,
                stderr=subprocess.STDOUT,
                # A shell starts what runs in its background with SIGINT ignored, which children inherit.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def assert_nothing_is_left(self, state: SupervisorState) -> None:
        assert not self.files.is_held()
        assert self.files.read() is None
        assert marked(state.run_id) == []
        assert not Path(state.folder).exists()


@pytest.fixture
def running(tmp_path: Path) -> Running:
    return Running(tmp_path)


def test_all_of_it(running: Running) -> None:
    state = wait_state(running.files)
    assert running.process.wait(DEADLINE_S) == 0, running.output
    told = running.output
    assert "every token was the same" in told
    assert "expert worker is killed" in told
    assert "which runs this chat" in told
    assert told.count("SIGKILL to process") == 2
    running.assert_nothing_is_left(state)


def test_an_interrupt_ends_the_cluster(running: Running) -> None:
    state = wait_state(running.files)
    running.wait(lambda: "is the head of Ray" in running.output)
    os.kill(running.process.pid, signal.SIGINT)
    assert running.process.wait(DEADLINE_S) == 130, running.output
    assert "nothing of it is left" in running.output
    running.assert_nothing_is_left(state)
