from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import Settings, load
from cluster.environment import MARK
from cluster.operate import down
from cluster.operate.leftovers import clean_up
from cluster.operate.state_file import ClusterFiles, SupervisorState
from tests.support.processes import wait_for_end

pytestmark = pytest.mark.needs("linux")

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 20.0
SLEEP = "import time; time.sleep(600)"
# A supervisor that holds the lock, and at SIGTERM takes its state away and ends.
SUPERVISOR = """
import os, signal, sys
from cluster.config import load
from cluster.operate.state_file import ClusterFiles, SupervisorState
files = ClusterFiles(load({"home": sys.argv[1], "cluster_name": "one"}))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with files.held():
    files.write(SupervisorState(pid=os.getpid(), run_id="none", folder="/none", url="", store="", drain_timeout_s=1.0))
    signal.sigwait({signal.SIGTERM})
    files.remove()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"home": tmp_path, "cluster_name": "one", "drain_timeout_s": 1.0})


@pytest.fixture
def left_behind(settings: Settings, tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """What a supervisor that was killed leaves: a child, a worker, a folder and its state."""
    files, run_id = ClusterFiles(settings), secrets.token_hex(8)
    sleeper = [sys.executable, "-S", "-c", SLEEP]
    running = {
        "child": subprocess.Popen(sleeper, env=os.environ | {MARK: run_id}, start_new_session=True),
        "worker": subprocess.Popen([*sleeper, "workers.server", "expert-0"], start_new_session=True),
        "stranger": subprocess.Popen(sleeper, start_new_session=True),
    }
    folder = tmp_path / "ft"
    folder.mkdir()
    with files.held():
        files.write(
            SupervisorState(
                pid=2**22 + 1, run_id=run_id, folder=str(folder), url="", store="unix:///none", drain_timeout_s=1.0
            )
        )
    (files.logs / "expert-0.pid").write_text(str(running["worker"].pid))
    (files.logs / "expert-1.pid").write_text(str(running["stranger"].pid))  # the id is another program's by now
    yield running
    for process in running.values():
        process.kill()
        process.wait(DEADLINE_S)


def test_without_a_cluster_there_is_nothing_to_stop(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert down.run(settings) == 1
    assert "no cluster called one" in capsys.readouterr().out


def test_a_living_supervisor_is_told_and_waited_for(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    files = ClusterFiles(settings)
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(settings.home)], cwd=ROOT) as supervisor:
        deadline = time.monotonic() + DEADLINE_S
        while files.read() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert down.run(settings) == 0
        assert supervisor.wait(DEADLINE_S) == 0
    assert capsys.readouterr().out == "one has ended\n"
    assert not files.is_held()


def test_it_waits_as_long_as_the_cluster_may_drain_whatever_its_own_settings_say(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(down, "MARGIN_S", 0.1)
    files = ClusterFiles(settings)
    ours = settings.model_copy(update={"drain_timeout_s": 3600.0})
    with subprocess.Popen([sys.executable, "-S", "-c", SLEEP]) as told, files.held():
        state = SupervisorState(pid=told.pid, run_id="r", folder="/none", url="", store="", drain_timeout_s=0.1)
        files.write(state)
        assert down.run(ours) == 1  # the lock is still held
        assert told.wait(DEADLINE_S) == -signal.SIGTERM
    assert "one has not ended yet" in capsys.readouterr().out


def test_what_a_dead_supervisor_left_is_ended(
    settings: Settings, left_behind: dict[str, subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert down.run(settings) == 0
    assert "ended 2 processes" in capsys.readouterr().out
    assert left_behind["child"].wait(DEADLINE_S) == -signal.SIGKILL
    assert left_behind["worker"].wait(DEADLINE_S) == -signal.SIGKILL
    assert left_behind["stranger"].poll() is None
    assert ClusterFiles(settings).read() is None
    assert not (settings.home / "ft").exists()
    assert down.run(settings) == 1


def test_cleaning_up_twice_ends_nothing_more(
    settings: Settings, left_behind: dict[str, subprocess.Popen[bytes]]
) -> None:
    files = ClusterFiles(settings)
    with files.held():
        assert clean_up(files) == 2
        for name in ("child", "worker"):
            wait_for_end(left_behind[name].pid, DEADLINE_S)
        assert clean_up(files) == 0
