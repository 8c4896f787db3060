"""What `loadtests/kill.py` reports: every kind and all of them, token by token."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.control.launch import PACKAGES
from loadtests.faults import KINDS, Kind
from loadtests.kill import COUNTS, PAUSES, Options, Tally, completions, rows, sum_up
from loadtests.report import as_json
from loadtests.token_streams import Difference

OPTIONS = Options(seed=1, kills=2)


def _tallies() -> dict[str, Tally]:
    return {
        "expert": Tally(2, Difference(100, lost=1), 1, [0.1, 0.3]),
        "redis": Tally(reason="no process of this kind runs here"),
    }


def test_every_kind_and_all_have_every_figure() -> None:
    found = {(row.case, row.metric): row for row in rows(_tallies())}
    assert set(found) == {(case, metric) for case in ("expert", "redis", "all") for metric in (*COUNTS, *PAUSES)}
    assert [found["all", metric].value for metric in COUNTS] == [2, 100, 1, 0, 0, 1]
    assert found["expert", "pause_p50_s"].value == pytest.approx(0.2)


def test_a_kind_that_cannot_be_done_says_so_beside_its_zero() -> None:
    (row,) = [as_json(row) for row in rows(_tallies()) if (row.case, row.metric) == ("redis", "kills")]
    assert (row["value"], row["reason"]) == (0.0, "no process of this kind runs here")
    others = [row for row in rows(_tallies()) if row.case == "redis" and row.metric != "kills"]
    assert {(row.value, row.reason) for row in others} == {(None, "no process of this kind runs here")}


def test_tallies_add_up() -> None:
    total = Tally()
    for tally in _tallies().values():
        sum_up(total, tally)
    assert (total.kills, total.difference, total.failed, total.pauses_s) == (2, Difference(100, 1), 1, [0.1, 0.3])


def test_requests_are_seeded_and_mixed() -> None:
    words = list(range(100, 300))
    first, again, other = (completions(OPTIONS, random.Random(seed), words, "m", 0.0) for seed in (1, 1, 2))
    assert first == again != other
    assert {body["temperature"] for body in first} == {0.0, 0.9}
    longer = completions(OPTIONS, random.Random(1), words, "m", lasts_s=8.0)
    assert all(more["max_tokens"] > body["max_tokens"] + 500 for more, body in zip(longer, first, strict=True)), (
        "what is struck for eight seconds must run for longer"
    )


def test_kinds_are_those_of_the_cluster() -> None:
    assert [kind.name for kind in KINDS] == [
        "expert", "expert_hung", "attention", "attention_hung", "controller", "redis", "ray_head",
    ]  # fmt: skip
    assert all(isinstance(kind, Kind) and kind.lasts_s >= 0 for kind in KINDS)


def test_it_runs_as_a_file(tmp_path: Path) -> None:
    command = [sys.executable, str(PACKAGES / "loadtests" / "kill.py"), "--kills", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--kills must be at least 1, not 0" in done.stderr
