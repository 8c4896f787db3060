from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.environment import PACKAGES
from cluster.files import LockedError, is_locked, locked, write_whole

DEADLINE_S = 60.0
HOLDS = """
import pathlib, sys
from cluster.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_replaced_whole_and_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_whole(path, b"before")
    with path.open("rb") as reader:
        write_whole(path, b"after")
        assert reader.read() == b"before"
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_leave_what_one_of_them_wrote(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    values = [bytes([i]) * 100_000 for i in range(8)]
    found: set[bytes] = set()
    begin = threading.Barrier(len(values))

    def write(value: bytes) -> None:
        begin.wait(DEADLINE_S)
        for _ in range(20):
            write_whole(path, value)
            found.add(path.read_bytes())

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert path.read_bytes() in found <= set(values)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(path, b"data")
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_one_processes_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, cwd=PACKAGES, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(path)
        with pytest.raises(LockedError), locked(path):
            pytest.fail("two hold it")
        threading.Timer(0.1, holder.kill).start()
        with locked(path, DEADLINE_S):
            assert is_locked(path)
    assert not is_locked(path)


def test_where_it_cannot_be_written_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), locked(tmp_path / "none" / "lock"):
        pytest.fail("there is no such folder")
