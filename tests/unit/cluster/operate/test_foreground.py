"""The command in the foreground and the process behind it, as programs of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import wait_for_end

pytestmark = pytest.mark.needs("linux")

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 20.0
# Writes its id, then for each order a line; ends with code 5 after the second order, or with 6 when there are no more.
# Leaves a file where the process behind goes on after its work.
PROGRAM = """
import os, sys
from pathlib import Path
from cluster.errors import ConfigError
from cluster.operate.foreground import run_behind

FRONT = os.getpid()

def work(orders):
    log = Path(sys.argv[1])
    if sys.argv[2] == "refuse":
        raise ConfigError("not like that")
    draft = log.with_suffix(".draft")
    draft.write_text(str(os.getpid()))
    draft.replace(log)
    for _ in range(2):
        if not os.read(orders, 1):
            log.with_suffix(".end").touch()
            return 6
        log.with_suffix(".order").touch()
    return 5

try:
    code = run_behind(work)
finally:
    if os.getpid() != FRONT:
        Path(sys.argv[1]).with_suffix(".after").touch()
sys.exit(code)
"""


def _start(log: Path, how: str = "work") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log), how],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_the_exit_code_back(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    with _start(log) as front:
        _wait_for(log)
        front.send_signal(number)
        _wait_for(log.with_suffix(".order"))
        assert front.poll() is None
        front.send_signal(number)
        assert front.wait(DEADLINE_S) == 5


def test_the_process_behind_is_no_descendant_and_outlives_the_foreground_to_end_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with _start(log) as front:
        _wait_for(log)
        behind = int(log.read_text())
        assert os.getsid(behind) != os.getsid(front.pid)
        assert str(behind) not in Path(f"/proc/{front.pid}/task/{front.pid}/children").read_text().split()
        front.kill()
        front.wait(DEADLINE_S)
        _wait_for(log.with_suffix(".end"))
        wait_for_end(behind, DEADLINE_S)


def test_a_process_behind_that_is_killed_is_told_from_one_that_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with _start(log) as front:
        _wait_for(log)
        os.kill(int(log.read_text()), signal.SIGKILL)
        assert front.wait(DEADLINE_S) == 255


def test_an_error_is_one_line(tmp_path: Path) -> None:
    with _start(tmp_path / "log", "refuse") as front:
        assert front.communicate(timeout=DEADLINE_S)[1] == "Error: not like that\n"
        assert front.returncode == 1


def test_the_process_behind_ends_when_nobody_is_left_to_hear_of_it(tmp_path: Path) -> None:
    """The foreground was killed, and who read its output is gone: neither keeps it from ending, with its exit code."""
    log = tmp_path / "log"
    with _start(log) as front:
        _wait_for(log)
        behind = int(log.read_text())
        assert front.stderr is not None
        front.stderr.close()
        front.kill()
        front.wait(DEADLINE_S)
        _wait_for(log.with_suffix(".end"))
        wait_for_end(behind, DEADLINE_S)
    assert not log.with_suffix(".after").exists()
