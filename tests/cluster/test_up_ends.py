"""However `cluster up` is ended, nothing of it goes on for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.operate.children import marked, sweep
from cluster.operate.leftovers import kill_workers
from cluster.operate.state_file import ClusterFiles
from cluster.operate.up import SAME_SIGNAL_S
from tests.support import cluster_up
from tests.support.cluster_up import Up, foretoken
from tests.support.eventually import wait_until
from tests.support.processes import has_ended

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(300)]

NAME = "ends"
DEADLINE_S = 90.0
ONE_OF_EACH = ("--local", "2", "--attention-workers", "1", "--expert-workers", "1")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ClusterFiles]:
    files = ClusterFiles(cluster_up.settings(tmp_path, NAME))
    yield files
    if (left := files.read()) is not None:
        sweep(left.run_id, left.folder)
    kill_workers(files)


def test_two_signals_during_the_start_leave_nothing(tmp_path: Path, files: ClusterFiles) -> None:
    up = Up(tmp_path, "--cluster-name", NAME, *ONE_OF_EACH)
    state = cluster_up.wait_state(files)
    wait_until(lambda: [*files.logs.glob("*.pid")], "a worker's process", deadline_s=DEADLINE_S)
    up.process.send_signal(signal.SIGINT)
    time.sleep(2 * SAME_SIGNAL_S)  # sooner it would count as the first one, come twice
    up.process.send_signal(signal.SIGINT)
    up.wait_end()
    wait_until(lambda: not marked(state.run_id), lambda: marked(state.run_id), deadline_s=DEADLINE_S)
    assert not Path(state.folder).exists()
    assert files.read() is None


def test_the_controller_and_the_workers_end_where_both_processes_were_killed(
    tmp_path: Path, files: ClusterFiles
) -> None:
    up = Up(tmp_path, "--cluster-name", NAME, *ONE_OF_EACH)
    up.wait_ready()
    state = cluster_up.wait_state(files)
    workers = [int(path.read_text()) for path in files.logs.glob("*.pid")]
    assert workers
    for pid in (up.process.pid, state.pid):
        os.kill(pid, signal.SIGKILL)
    up.wait_end()
    ours = [state.children["gateway"], state.children["controller"], *workers]
    wait_until(lambda: all(map(has_ended, ours)), lambda: ours, deadline_s=DEADLINE_S)
    down = foretoken(tmp_path, "cluster", "down", "--cluster-name", NAME)
    assert down.returncode == 0, down.stdout + down.stderr
    assert marked(state.run_id) == []
