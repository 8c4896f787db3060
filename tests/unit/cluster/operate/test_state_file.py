from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import load
from cluster.errors import ConfigError
from cluster.operate.state_file import Places, SupervisorState, nothing_runs

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 20.0
HOLDER = """
import sys, time
from cluster.config import load
from cluster.operate.state_file import Places
with Places(load({"home": sys.argv[1], "cluster_name": "one"})).held():
    time.sleep(600)
"""
STATE = SupervisorState(pid=7, run_id="r", folder="/f", url="http://u", store="unix:///s", token="t", children={"a": 1})


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(load({"home": tmp_path, "cluster_name": "one"}))


def test_a_state_is_read_as_it_was_written_by_its_user_only(places: Places) -> None:
    with places.held():
        places.write(STATE)
    assert places.read() == STATE
    assert places.state.stat().st_mode & 0o077 == 0
    places.remove()
    assert places.read() is None


def test_a_broken_state_is_none(places: Places) -> None:
    with places.held():
        places.state.write_text('{"pid": "seven"}')
    assert places.read() is None


def test_one_at_a_time(places: Places) -> None:
    assert not places.is_held()
    with places.held():
        places.write(STATE)
        assert places.is_held()
        with (
            pytest.raises(
                ConfigError, match=r"one runs on this machine \(process 7\).*cluster down --cluster-name one`"
            ),
            places.held(),
        ):
            pass
    assert not places.is_held()
    with places.held():
        assert places.is_held()


def test_the_default_name_needs_no_flag(tmp_path: Path) -> None:
    assert Places(load({"home": tmp_path, "cluster_name": "foretoken"})).flag == ""


def test_where_none_of_a_name_runs_the_others_are_named(places: Places, tmp_path: Path) -> None:
    wanted = load({"home": tmp_path, "cluster_name": "two"})
    assert nothing_runs(wanted) == "no cluster called two runs here"
    with places.held():
        assert nothing_runs(wanted) == "no cluster called two runs here; these do: --cluster-name one"


def test_the_lock_ends_with_its_process(places: Places) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(places.lock.parents[2])], cwd=ROOT) as holder:
        deadline = time.monotonic() + DEADLINE_S
        while not places.is_held():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        holder.kill()
    assert not places.is_held()
