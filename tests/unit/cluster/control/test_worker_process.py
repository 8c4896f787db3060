from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cluster.control.worker_process import WorkerProcess
from cluster.environment import PACKAGES
from cluster.errors import DeadlineError, WorkerLostError
from cluster.protocol import Launch
from tests.support.eventually import eventually
from tests.support.processes import has_ended, wait_for_end

FAKE = Path(__file__).resolve().parents[3] / "support" / "faulty_worker.py"
DEADLINE_S = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ft-") as name:  # short: a socket's path has a limit of about 100 bytes
        yield Path(name)


def _worker(folder: Path, behaviour: str, output: io.BytesIO | None = None, **options: float) -> WorkerProcess:
    launch = Launch(address=f"unix:{folder}/worker.sock", model_path="/models/m", served_name="m", max_num_seqs=7)
    return WorkerProcess(
        launch,
        environment=os.environ,
        start_timeout_s=options.get("start_timeout_s", DEADLINE_S),
        command=(sys.executable, str(FAKE), behaviour, str(folder)),
        backoff=lambda _: 0.0,
        output=io.BytesIO() if output is None else output,
    )


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * DEADLINE_S):
            await body()

    asyncio.run(bounded())


def test_start_sends_the_launch_line_and_returns_when_the_socket_answers(folder: Path) -> None:
    async def body() -> None:
        output = io.BytesIO()
        worker = _worker(folder, "serves", output)
        await worker.start()
        pid = worker.pid
        assert pid is not None
        assert json.loads((folder / f"{pid}.json").read_text())["launch"]["max_num_seqs"] == 7
        await worker.stop(DEADLINE_S)
        assert worker.pid is None
        assert has_ended(pid)
        assert b"ready\n" in output.getvalue()
        assert b"on stdout\n" in output.getvalue()

    _run(body)


def test_a_death_during_start_tells_exit_code_and_last_lines(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "fails")
        with pytest.raises(WorkerLostError, match=r"exit code 3 while it started") as caught:
            await worker.start()
        assert caught.value.message.endswith("config.json: the field 'rope' is not supported")
        assert worker.num_starts == 1

    _run(body)


def test_a_workers_last_word_becomes_the_error_and_is_not_shown_twice(folder: Path) -> None:
    async def body() -> None:
        output = io.BytesIO()
        worker = _worker(folder, "refuses", output)
        with pytest.raises(WorkerLostError, match=r"^config\.json: no field 'rope'$"):
            await worker.start()
        assert output.getvalue() == b"loading; error: only a warning\n"

    _run(body)


def test_once_it_serves_a_line_of_an_error_hides_nothing_behind_it(folder: Path) -> None:
    async def body() -> None:
        output = io.BytesIO()
        worker = _worker(folder, "grumbles", output)
        await worker.start()
        (folder / "served").touch()
        _, writer = await asyncio.open_unix_connection(worker.launch.address.removeprefix("unix:"))
        writer.close()
        await eventually(lambda: b"Traceback of it\n" in output.getvalue())
        assert b"error: a step failed\n" in output.getvalue()
        await worker.stop(DEADLINE_S)

    _run(body)


def test_a_program_that_cannot_be_run_at_all_is_an_error(folder: Path) -> None:
    async def body() -> None:
        worker = WorkerProcess(
            _worker(folder, "serves").launch,
            environment={},
            start_timeout_s=1,
            command=(sys.executable, "-c", "import no"),
        )
        with pytest.raises(WorkerLostError, match="No module named 'no'"):
            await worker.start()

    _run(body)


def test_a_start_that_takes_too_long_is_ended(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "hangs", start_timeout_s=1.0)
        with pytest.raises(DeadlineError, match=r"not ready after 1 s \(start_timeout_s\)"):
            await worker.start()
        assert worker.pid is None

    _run(body)


def test_stop_during_start_gives_up_at_once(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "hangs")
        start = asyncio.create_task(worker.start())
        await eventually(lambda: worker.pid is not None)
        await worker.stop(DEADLINE_S)
        with pytest.raises(WorkerLostError, match="stopped while it started"):
            await start
        assert worker.pid is None

    _run(body)


def test_a_killed_worker_is_started_again_on_the_same_address(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "serves")
        await worker.start()
        watch = asyncio.create_task(worker.watch())
        for _ in range(2):
            first = worker.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await eventually(lambda first=first: worker.pid not in (None, first))  # type: ignore[misc]
            await eventually(lambda: (folder / "worker.sock").exists())
        assert worker.num_starts == 3
        await worker.stop(DEADLINE_S)
        await watch

    _run(body)


def test_three_equal_failures_to_start_again_give_up(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "fails-after-first")
        await worker.start()
        watch = asyncio.create_task(worker.watch())
        os.kill(worker.pid or 0, signal.SIGKILL)
        with pytest.raises(
            WorkerLostError, match=r"(?s)gave up after 3 equal failures.*exit code 4.*the model is gone"
        ):
            await watch
        assert worker.num_starts == 4
        await worker.stop(DEADLINE_S)

    _run(body)


def test_a_worker_that_ignores_sigterm_is_killed_at_the_deadline(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "stubborn")
        await worker.start()
        pid = worker.pid
        assert pid is not None
        await worker.stop(0.1)
        assert has_ended(pid)
        await worker.stop(0.1)  # again: nothing to do

    _run(body)


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(folder: Path) -> None:
    async def body() -> None:
        worker = _worker(folder, "serves")
        await worker.start()
        assert os.getpgid(worker.pid or 0) != os.getpgid(0)
        await worker.stop(DEADLINE_S)

    _run(body)


def test_a_worker_ends_when_its_parent_is_killed(folder: Path) -> None:
    program = f"""
import asyncio, os, sys
from cluster.control.worker_process import WorkerProcess
from cluster.protocol import Launch
from tests.support.processes import has_ended, wait_for_end
async def main():
    launch = Launch(address="unix:{folder}/worker.sock", model_path="m", served_name="m")
    worker = WorkerProcess(launch, environment=os.environ, start_timeout_s=20,
                           command=(sys.executable, "{FAKE}", "serves", "{folder}"))
    await worker.start()
    print(worker.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGES)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(pid, DEADLINE_S)
