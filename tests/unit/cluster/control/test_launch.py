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
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.config import load
from cluster.control.launch import WorkerProcess, backoff_s, launch_message, socket_folder, worker_environment
from cluster.environment import PACKAGES
from cluster.errors import DeadlineError, WorkerLostError
from cluster.machine import Machine
from cluster.protocol import Launch
from tests.support.processes import has_ended, wait_for_end

FAKE = Path(__file__).resolve().parents[3] / "support" / "fake_worker.py"
MACHINE = Machine("Linux", "x86_64", "A processor", frozenset({"avx2", "avx512f"}), 8, None, 2**34, 2**33)
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


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


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
        await _until(lambda: b"Traceback of it\n" in output.getvalue())
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
        await _until(lambda: worker.pid is not None)
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
            await _until(lambda first=first: worker.pid not in (None, first))  # type: ignore[misc]
            await _until(lambda: (folder / "worker.sock").exists())
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
from cluster.control.launch import WorkerProcess
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


def test_the_sockets_folder_is_private_short_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with socket_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder)) < 90
        (folder / "worker.sock").touch()
    assert not folder.exists()


def test_backoff_grows_to_a_bound() -> None:
    assert [backoff_s(deaths) for deaths in (1, 2, 3, 4)] == [0.0, 0.5, 1.0, 2.0]
    assert backoff_s(50) == 10.0


def test_the_launch_message_carries_the_settings() -> None:
    settings = load({"device": "cpu", "kv_cache_bytes": "1GiB", "log_format": "json", "max_model_len": 512})
    launch = launch_message(
        settings, address="unix:/s", model_path=Path("/m"), served_name="n", progress=True, machine=MACHINE
    )
    assert msgspec.json.decode(msgspec.json.encode(launch), type=Launch) == launch
    assert launch.host_memory_bytes == MACHINE.available_bytes
    assert (launch.device, launch.kv_cache_bytes, launch.log_format, launch.max_model_len) == (
        "cpu",
        2**30,
        "json",
        512,
    )
    assert (launch.address, launch.model_path, launch.served_name, launch.progress) == ("unix:/s", "/m", "n", True)
    assert launch.exit_with_parent


LAUNCH = Launch(address="unix:/s", model_path="/m", served_name="n")


@pytest.mark.parametrize(
    ("numerics", "device", "architecture", "flags", "expected"),
    [
        ("auto", "auto", "x86_64", {"avx2", "avx512f"}, "AVX512,STRICT"),
        ("auto", "cpu", "x86_64", {"avx2"}, "AVX2,STRICT"),
        ("invariant", "cuda", "x86_64", {"avx2"}, "AVX2,STRICT"),
        ("auto", "cuda:1", "x86_64", {"avx2"}, None),
        ("fast", "cpu", "x86_64", {"avx2"}, None),
        ("invariant", "cpu", "x86_64", {"sse4_2"}, None),
        ("invariant", "cpu", "aarch64", {"asimd"}, None),
    ],
)
def test_mkl_is_held_to_one_order_where_results_must_not_depend_on_the_batch(
    numerics: str, device: str, architecture: str, flags: set[str], expected: str | None
) -> None:
    launch = Launch(address="unix:/s", model_path="/m", served_name="n", numerics=numerics, device=device)  # type: ignore[arg-type]
    machine = replace(MACHINE, architecture=architecture, cpu_flags=frozenset(flags))
    assert worker_environment(launch, machine, {}).get("MKL_CBWR") == expected


def test_threads_follow_the_setting_then_the_containers_quota() -> None:
    assert "OMP_NUM_THREADS" not in worker_environment(LAUNCH, MACHINE, {})
    assert worker_environment(LAUNCH, replace(MACHINE, cpu_quota=2.0), {})["OMP_NUM_THREADS"] == "2"
    wanted = Launch(address="unix:/s", model_path="/m", served_name="n", num_threads=3)
    assert worker_environment(wanted, replace(MACHINE, cpu_quota=2.0), {})["MKL_NUM_THREADS"] == "3"


def test_the_worker_is_found_beside_cluster_whatever_the_current_folder_holds() -> None:
    environment = worker_environment(LAUNCH, MACHINE, {"PYTHONPATH": "/elsewhere", "HOME": "/h"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(PACKAGES), "/elsewhere"]
    assert environment["HOME"] == "/h"
    assert (PACKAGES / "workers").is_dir()


def test_a_worker_inherits_no_secret_and_nobodys_settings() -> None:
    inherited = {"FORETOKEN_STORE": "redis://h", "RAY_AUTH_TOKEN": "r", "HF_TOKEN": "h", "PATH": "/b"}
    assert set(worker_environment(LAUNCH, MACHINE, inherited)) - {"MKL_CBWR"} == {"PATH", "PYTHONPATH"}


def test_the_token_of_a_launch_is_not_shown() -> None:
    assert "hidden" not in repr(msgspec.structs.replace(LAUNCH, token="hidden"))
    assert "token=None" in repr(LAUNCH)
