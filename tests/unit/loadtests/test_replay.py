"""The replay of a trace: the same load for both servers, and one table."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loadtests.generator import read_job
from loadtests.processes import Server
from loadtests.replay import MEASURES, Options, job, main, rows
from loadtests.traces import Arrival

ARRIVALS = [Arrival(0.0, 5, 3), Arrival(0.5, 2, 1)]
WORDS = list(range(100, 300))


def test_both_servers_get_the_same_requests_at_the_same_times() -> None:
    one, other = (
        read_job(msgspec.json.encode(job(Server(url, "m"), ARRIVALS, WORDS, seed=3)))
        for url in ("http://a", "http://b")
    )
    assert (one.requests, one.arrivals) == (other.requests, other.arrivals)
    assert [(len(request.prompt), request.max_tokens) for request in one.requests] == [(5, 3), (2, 1)]


def test_the_cluster_stands_beside_one_worker() -> None:
    one = {key: 2.0 for _, _, key, _ in MEASURES}
    many = {key: 1.0 for _, _, key, _ in MEASURES}
    table = rows(Options(), one, many, num_requests=2)
    assert [row.metric for row in table] == [metric for metric, *_ in MEASURES]
    assert all(row.ratio == pytest.approx(0.5) for row in table)


def test_a_missing_trace_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORETOKEN_DATA", str(tmp_path))
    assert main([]) == 1
    assert "set FORETOKEN_DATA to a folder" in " ".join(capsys.readouterr().err.split())
