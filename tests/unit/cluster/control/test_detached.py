from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control import detached
from cluster.control.detached import end, is_running, start_detached
from cluster.errors import DeadlineError, StartRefusedError, WorkerLostError
from cluster.protocol import Announcement, Launch
from tests.support.processes import has_ended, wait_for_end

DEADLINE_S = 20.0
PROGRAM = """
import json, os, signal, sys
launch = json.loads(sys.stdin.readline())
how = launch["model_path"]
print("on stdout", flush=True)
print("on stderr", file=sys.stderr, flush=True)
if how == "refuses":
    print("error: no such model", file=sys.stderr, flush=True)
    raise SystemExit(2)
if how == "fails":
    raise SystemExit(3)
if how == "hangs":
    signal.pause()
if how == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
assert "exit_with_parent" in launch and sys.stdin.read() == ""
text = json.dumps({"pid": os.getpid(), "address": "127.0.0.1:7", "worker_id": launch["served_name"]})
with open(launch["announce_path"] + "~", "w") as file:
    file.write(text)
os.replace(launch["announce_path"] + "~", launch["announce_path"])
signal.pause()
"""


@pytest.fixture
def log_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "logs" / "expert-0.log"
    yield path
    if path.with_suffix(".pid").exists():
        end(int(path.with_suffix(".pid").read_text()), kill=True)


def _start(log_path: Path, how: str = "serves", *, timeout_s: float = DEADLINE_S, **options: object) -> Announcement:
    launch = Launch(address="127.0.0.1:0", model_path=how, served_name="w", name="expert-0", token="a secret")
    command = (sys.executable, "-c", PROGRAM, "workers.server")
    return start_detached(launch, os.environ, log_path, timeout_s, command=command, **options)  # type: ignore[arg-type]


def test_a_worker_serves_as_nobodys_child_and_shows_no_secret(log_path: Path) -> None:
    worker = _start(log_path)
    assert (worker.address, worker.worker_id) == ("127.0.0.1:7", "w")
    assert is_running(worker.pid, "expert-0")
    assert os.getsid(worker.pid) != os.getsid(0)
    with pytest.raises(ChildProcessError):
        os.waitpid(worker.pid, os.WNOHANG)
    assert log_path.read_text() == "on stdout\non stderr\n"
    shown = subprocess.run(("ps", "-ww", "-p", str(worker.pid), "-o", "command="), capture_output=True, text=True)
    assert "expert-0" in shown.stdout
    assert "secret" not in shown.stdout


def test_it_outlives_who_started_it(log_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom cluster.control.detached import start_detached\n"
        "from cluster.protocol import Launch\n"
        "launch = Launch(address='a:0', model_path='serves', served_name='w', name='expert-0')\n"
        "command = (sys.executable, '-c', sys.argv[1], 'workers.server')\n"
        f"worker = start_detached(launch, os.environ, Path({str(log_path)!r}), 20.0, command=command)\n"
        "print(worker.pid, flush=True)\nos.killpg(0, 9)\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", program, PROGRAM), stdout=subprocess.PIPE, start_new_session=True, timeout=DEADLINE_S
    )
    assert done.returncode == -signal.SIGKILL
    assert is_running(int(done.stdout), "expert-0")


def test_its_own_words_become_the_error(log_path: Path) -> None:
    with pytest.raises(StartRefusedError, match=r"^no such model$"):
        _start(log_path, "refuses")


def test_otherwise_its_last_lines_do(log_path: Path) -> None:
    with pytest.raises(WorkerLostError, match="ended while it started") as caught:
        _start(log_path, "fails")
    assert not isinstance(caught.value, StartRefusedError)
    assert str(log_path) in caught.value.message
    assert caught.value.message.endswith("on stdout\non stderr")


def test_a_start_that_takes_too_long_is_ended(log_path: Path) -> None:
    with pytest.raises(DeadlineError, match=r"not ready after 0\.3 s \(start_timeout_s\)"):
        _start(log_path, "hangs", timeout_s=0.3)
    wait_for_end(int(log_path.with_suffix(".pid").read_text()), DEADLINE_S)


@pytest.mark.parametrize(
    ("shell", "error", "text"),
    [
        ("exec sleep 1000", DeadlineError, r"expert-0 did not take its launch message within 0\.3 s"),
        ("echo no room >&2", WorkerLostError, r"the shell did not start expert-0\. Its last lines:\nno room"),
    ],
)
def test_a_shell_that_says_no_id_is_no_hang(
    log_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, error: type[Exception], text: str
) -> None:
    monkeypatch.setattr(detached, "SHELL_TIMEOUT_S", 0.3 if error is DeadlineError else DEADLINE_S)
    monkeypatch.setattr(detached, "START", shell)
    with pytest.raises(error, match=text):
        _start(log_path)
    assert not log_path.with_suffix(".pid").exists()


def test_a_start_can_be_given_up(log_path: Path) -> None:
    give_up = threading.Event()
    give_up.set()
    with pytest.raises(WorkerLostError, match="stopped while it started"):
        _start(log_path, "hangs", give_up=give_up)
    wait_for_end(int(log_path.with_suffix(".pid").read_text()), DEADLINE_S)


def test_a_twin_that_was_left_behind_is_ended_first(log_path: Path) -> None:
    first = _start(log_path)
    second = _start(log_path)
    assert has_ended(first.pid)
    assert is_running(second.pid, "expert-0")


def test_the_logs_of_the_last_starts_are_kept(log_path: Path) -> None:
    for _ in range(6):
        with pytest.raises(WorkerLostError):
            _start(log_path, "refuses")
    names = sorted(path.name for path in log_path.parent.iterdir() if ".log" in path.name)
    assert names == ["expert-0.log", "expert-0.log.1", "expert-0.log.2", "expert-0.log.3"]


def test_only_the_worker_of_that_name_is_known_and_ended_by_its_id(log_path: Path) -> None:
    worker = _start(log_path)
    assert not is_running(worker.pid, "expert-1")
    assert not is_running(os.getpid())
    end(worker.pid, "expert-1", kill=True)
    end(os.getpid(), kill=True)  # we are no worker
    assert is_running(worker.pid)
    end(worker.pid, "expert-0", kill=False)
    wait_for_end(worker.pid, DEADLINE_S)
    end(worker.pid, "expert-0", kill=True)
    assert not is_running(0)
    assert not is_running(-1)


def test_kill_ends_what_ignores_sigterm(log_path: Path) -> None:
    worker = _start(log_path, "ignores")
    end(worker.pid, kill=False)
    assert is_running(worker.pid)
    end(worker.pid, kill=True)
    wait_for_end(worker.pid, DEADLINE_S)
