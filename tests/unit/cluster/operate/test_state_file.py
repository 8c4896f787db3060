from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cluster.config import load
from cluster.errors import ConfigError
from cluster.operate.state_file import ClusterFiles, KeptState, SupervisorState, nothing_runs
from tests.support.eventually import eventually, wait_until
from tests.support.full_disk import full_disk

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 20.0
HOLDER = """
import sys, time
from cluster.config import load
from cluster.operate.state_file import ClusterFiles
with ClusterFiles(load({"home": sys.argv[1], "cluster_name": "one"})).held():
    time.sleep(600)
"""
STATE = SupervisorState(
    pid=7, run_id="r", folder="/f", url="http://u", store="unix://:pw@/s", drain_timeout_s=2.0, children={"a": 1}
)


@pytest.fixture
def files(tmp_path: Path) -> ClusterFiles:
    return ClusterFiles(load({"home": tmp_path, "cluster_name": "one"}))


def test_a_state_is_read_as_it_was_written_by_its_user_only(files: ClusterFiles) -> None:
    with files.held():
        files.write(STATE)
    assert files.read() == STATE
    assert files.state.stat().st_mode & 0o077 == 0
    assert "pw" not in repr(STATE)
    files.remove()
    assert files.read() is None


def test_a_broken_state_is_none(files: ClusterFiles) -> None:
    with files.held():
        files.state.write_text('{"pid": "seven"}')
    assert files.read() is None


def test_one_at_a_time(files: ClusterFiles) -> None:
    assert not files.is_held()
    with files.held():
        files.write(STATE)
        assert files.is_held()
        with (
            pytest.raises(
                ConfigError, match=r"one runs on this machine \(process 7\).*cluster down --cluster-name one`"
            ),
            files.held(),
        ):
            pass
    assert not files.is_held()
    with files.held():
        assert files.is_held()


def test_the_default_name_needs_no_flag(tmp_path: Path) -> None:
    assert ClusterFiles(load({"home": tmp_path, "cluster_name": "foretoken"})).flag == ""


def test_where_none_of_a_name_runs_the_others_are_named(files: ClusterFiles, tmp_path: Path) -> None:
    wanted = load({"home": tmp_path, "cluster_name": "two"})
    assert nothing_runs(wanted) == "no cluster called two runs here"
    with files.held():
        assert nothing_runs(wanted) == "no cluster called two runs here; these do: --cluster-name one"


def test_the_lock_ends_with_its_process(files: ClusterFiles) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(files.lock.parents[2])], cwd=ROOT) as holder:
        wait_until(files.is_held)
        holder.kill()
    assert not files.is_held()


def test_a_full_disk_holds_up_nobody_once_there_is_a_state(
    files: ClusterFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        children = {"a": 1}
        kept = KeptState(files, lambda: msgspec.structs.replace(STATE, children=dict(children)))
        with full_disk(), pytest.raises(OSError, match="No space left"):
            kept.write()
        kept.write()
        with full_disk():
            for pid in range(2, 5):
                children["a"] = pid
                kept.write()
            assert files.read() == STATE
        await eventually(lambda: files.read() != STATE)
        assert files.read() == msgspec.structs.replace(STATE, children={"a": 4})
        kept.close()

    with files.held():
        asyncio.run(body())
    assert caplog.text.count("cannot be written") == 1
