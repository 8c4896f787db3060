"""Who is not controlled any more ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workers.lease import Lease

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 20.0


def test_it_ends_the_process_when_nobody_renews_it_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    died = threading.Event()
    lease = Lease(0.1, "nobody came for {:g} s (who)", died.set)
    began = time.monotonic()
    lease.start()
    assert died.wait(DEADLINE_S)
    assert time.monotonic() - began >= 0.1
    (record,) = caplog.records
    assert record.levelno == logging.CRITICAL
    assert record.getMessage() == "nobody came for 0.1 s (who): this worker ends itself"


def test_a_renewal_begins_the_time_again() -> None:
    ended_s: list[float] = []
    died = threading.Event()

    def die() -> None:
        ended_s.append(time.monotonic())
        died.set()

    lease = Lease(0.5, "", die)
    began = time.monotonic()
    lease.start()
    while time.monotonic() - began < 1.0:
        lease.renew()
        died.wait(0.02)
    renewed_s = time.monotonic()
    assert died.wait(DEADLINE_S)
    assert ended_s[0] - renewed_s >= 0.4  # a look may already have taken the last renewal but one


def test_a_renewal_may_be_for_longer_and_the_next_takes_that_back() -> None:
    died = threading.Event()
    lease = Lease(0.2, "", died.set)
    lease.start()
    lease.renew(3600.0)
    assert not died.wait(2.0)
    lease.renew()
    assert died.wait(DEADLINE_S)


def test_a_process_whose_main_thread_hangs_ends_as_well() -> None:
    script = "from workers.lease import Lease\nLease(0.2, '').start()\nwhile True: pass"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=DEADLINE_S)
    assert ended.returncode == 1
    assert b"this worker ends itself" in ended.stderr


def test_a_log_that_hangs_does_not_keep_it_alive() -> None:
    died, hung = threading.Event(), threading.Event()

    class Hangs(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hung.wait(DEADLINE_S)

    handler = Hangs()
    logging.getLogger("workers.lease").addHandler(handler)
    try:
        Lease(0.05, "", died.set).start()
        assert died.wait(DEADLINE_S / 2)
    finally:
        hung.set()
        logging.getLogger("workers.lease").removeHandler(handler)


def test_one_that_was_ended_is_over_without_harm() -> None:
    before = threading.active_count()
    lease = Lease(0.1, "", lambda: pytest.fail("it ended the process"))
    lease.start()
    lease.end()
    deadline = time.monotonic() + DEADLINE_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_without_a_time_it_lasts() -> None:
    before = threading.active_count()
    Lease(None, "", lambda: pytest.fail("it ended")).start()
    assert threading.active_count() == before
