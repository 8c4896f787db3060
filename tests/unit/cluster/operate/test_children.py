from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from cluster.environment import MARK
from cluster.errors import WorkerLostError
from cluster.operate.children import Child, in_session, marked, sweep
from cluster.operate.redis_server import is_answering, redis_child
from tests.support.eventually import eventually, wait_until
from tests.support.processes import has_ended, wait_for_end

pytestmark = pytest.mark.needs("linux")

DEADLINE_S = 20.0
MAY_RENICE = 1 << 23 | 1 << 21  # CAP_SYS_NICE, CAP_SYS_ADMIN
SLEEP = "import time; time.sleep(600)"
# A process that starts one in its session and one in a session of its own, and says who they are.
FAMILY = f"""
import subprocess, sys
near = subprocess.Popen([sys.executable, "-S", "-c", {SLEEP!r}])
far = subprocess.Popen([sys.executable, "-S", "-c", {SLEEP!r}], start_new_session=True)
print(near.pid, far.pid, flush=True)
near.wait()
"""


@pytest.fixture
def run_id() -> Iterator[str]:
    run_id = secrets.token_hex(8)
    yield run_id
    sweep(run_id)


@pytest.fixture
def child(tmp_path: Path, run_id: str) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(program: str, **fields: object) -> Child:
        command = (sys.executable, "-S", "-c", program)
        made.append(Child("it", command, os.environ | {MARK: run_id}, tmp_path / "it.log", **fields))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.end_session()


def test_a_dead_child_is_started_again_and_a_stopped_one_is_not(child: Callable[..., Child]) -> None:
    changes: list[int | None] = []
    one = child(SLEEP)
    one.on_change = lambda: changes.append(one.pid)

    async def scenario() -> None:
        one.start()
        keeper = asyncio.create_task(one.keep_up())
        first = one.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: one.pid not in (None, first))
        second = one.pid
        await one.stop()
        await asyncio.wait_for(keeper, DEADLINE_S)
        assert one.pid is None
        assert changes == [first, None, second]

    asyncio.run(scenario())


def test_a_dead_child_is_started_again_once_what_it_needs_is_there(child: Callable[..., Child], tmp_path: Path) -> None:
    leftover, needed = tmp_path / "leftover", tmp_path / "needed"
    num_looks = 0

    def may_start() -> bool:
        nonlocal num_looks
        num_looks += 1
        return needed.exists()

    one = child(SLEEP, before_start=leftover.unlink, may_start=may_start)

    async def scenario() -> None:
        leftover.touch()
        one.start()
        assert not leftover.exists()
        leftover.touch()
        keeper = asyncio.create_task(one.keep_up())
        first = one.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: num_looks > 2)
        assert one.pid is None
        assert leftover.exists()
        needed.touch()
        await eventually(lambda: one.pid not in (None, first))
        assert not leftover.exists()
        needed.unlink()
        os.kill(one.pid or 0, signal.SIGKILL)
        num_looks_before = num_looks
        await eventually(lambda: num_looks > num_looks_before)
        await one.stop()  # while it waits
        await asyncio.wait_for(keeper, DEADLINE_S)

    asyncio.run(scenario())


def test_one_that_ends_tells_its_last_lines(child: Callable[..., Child]) -> None:
    one = child("print('first'); print('Error: no such thing'); raise SystemExit(3)")
    one.start()
    wait_until(lambda: one.pid is None)
    with pytest.raises(WorkerLostError, match=r"(?s)it ended with exit code 3.*first\nError: no such thing"):
        one.check()


def test_last_lines_are_those_of_the_present_process(child: Callable[..., Child]) -> None:
    one = child("import os; print('from', os.getpid())")
    one.start()
    wait_until(lambda: one.pid is None)
    before = one.last_lines
    one.end_session()
    one.start()
    wait_until(lambda: one.pid is None)
    assert one.last_lines != before
    assert len(one.last_lines.splitlines()) == 1
    assert before in one.log_path.read_text()


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerLostError, match="it cannot be started"):
        Child("it", (str(tmp_path / "none"),), {}, tmp_path / "it.log").start()


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    one = Child(name="one", command=["true"], environment={}, log_path=tmp_path / "none" / "one.log")
    with pytest.raises(WorkerLostError, match="one cannot be started"):
        one.start()


def test_what_it_reads_is_not_on_its_command_line(child: Callable[..., Child]) -> None:
    one = child("import sys; print(len(sys.stdin.read()))", stdin=b"secret")
    one.start()
    wait_until(lambda: one.pid is None)
    assert one.last_lines == "6"
    assert "secret" not in repr(one)


def test_the_end_of_a_child_is_the_end_of_its_session(child: Callable[..., Child], run_id: str) -> None:
    one = child(FAMILY, grace_s=0.0)
    one.start()
    wait_until(lambda: len(one.last_lines.split()) == 2)
    near, far = map(int, one.last_lines.split())
    pid = one.pid
    asyncio.run(one.stop())
    wait_for_end(near, DEADLINE_S)
    assert not has_ended(far)
    assert marked(run_id) == [far]
    assert sweep(run_id) == 1
    assert has_ended(far)
    assert pid is not None
    assert has_ended(pid)


def test_a_session_is_its_leader_and_what_that_started_in_it(child: Callable[..., Child]) -> None:
    family = child(FAMILY)
    family.start()
    wait_until(lambda: len(family.last_lines.split()) == 2)
    near, far = map(int, family.last_lines.split())
    assert family.pid is not None
    assert sorted(in_session(family.pid)) == sorted([family.pid, near])
    assert far not in in_session(family.pid)
    assert in_session(2**30) == []


@pytest.mark.needs("redis")
def test_a_redis_that_hides_its_mark_is_found_by_its_socket(tmp_path: Path, run_id: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))  # a socket's path is short
    environment = os.environ | {MARK: run_id}
    redis, _ = redis_child(folder, SecretStr("secret"), tmp_path / "redis.log", environment)
    redis.start()
    try:
        wait_until(lambda: is_answering(folder))
        assert marked(run_id, str(folder)) == [redis.pid]
        assert marked(run_id, str(folder / "other")) == marked(run_id)
        assert sweep(run_id, str(folder)) == 1
        assert redis.pid is None
    finally:
        redis.end_session()
        shutil.rmtree(folder)


def test_one_that_ignores_sigterm_is_killed_after_its_grace(child: Callable[..., Child]) -> None:
    one = child(
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); {SLEEP}", grace_s=0.2
    )
    one.start()
    wait_until(lambda: one.last_lines == "1")
    asyncio.run(one.stop())
    assert one.pid is None


def test_a_sweep_leaves_others_alone(child: Callable[..., Child]) -> None:
    one = child(SLEEP)
    one.start()
    assert sweep(secrets.token_hex(8)) == 0
    assert one.pid is not None


def test_a_session_has_its_own_niceness_where_that_is_permitted(child: Callable[..., Child]) -> None:
    one = child(SLEEP, niceness=-7)
    one.start()
    assert one.pid is not None
    autogroup = Path(f"/proc/{one.pid}/autogroup")
    (held,) = re.findall(r"^CapEff:\t(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if autogroup.exists() and int(held, 16) & MAY_RENICE == MAY_RENICE:
        assert autogroup.read_text().split()[-1] == "-7"
