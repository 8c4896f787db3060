"""Rows, their JSON and the table."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from loadtests import report
from loadtests.report import Row, as_json, print_table, show, write_json

KEYS = {"bench", "case", "metric", "value", "unit", "baseline", "ratio", "machine", "commit"}
MEASURED = Row(
    bench="b", case="c", metric="tpot_s", unit="s", value=0.002, baseline=0.004, note="beside x", goal="<= 1"
)
MISSING = Row(bench="b", case="c", metric="m", unit="ratio", reason="no x here")


def test_a_measured_row() -> None:
    row = as_json(MEASURED)
    assert set(row) == KEYS | {"note"}
    assert row["ratio"] == 0.5
    assert (row["value"], row["baseline"], row["unit"]) == (0.002, 0.004, "s")
    assert "torch" in row["machine"]
    assert "GiB" in row["machine"]
    assert row["commit"]


def test_an_unmeasured_row_says_why() -> None:
    row = as_json(MISSING)
    assert set(row) == KEYS | {"reason"}
    assert (row["value"], row["ratio"], row["reason"]) == (None, None, "no x here")


@pytest.mark.parametrize("fields", [{"value": 1.0, "reason": "x"}, {}])
def test_a_value_or_a_reason(fields: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Row(bench="b", case="c", metric="m", unit="s", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("baseline", [None, 0.0])
def test_no_ratio_without_a_baseline(baseline: float | None) -> None:
    assert Row(bench="b", case="c", metric="m", unit="s", value=1.0, baseline=baseline).ratio is None


def test_the_file_is_one_array(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("old")
    write_json([MEASURED, MISSING], file)
    rows = json.loads(file.read_text())
    assert [row["metric"] for row in rows] == ["tpot_s", "m"]
    assert list(tmp_path.iterdir()) == [file]


def test_the_table_has_every_row_and_reason() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_table([MEASURED, MISSING], console)
    text = console.export_text()
    for part in ("tpot_s", "0.00200", "0.00400", "0.500", "<= 1", "beside x", "no x here", "machine:"):
        assert part in text


def test_of_how_many_a_percentile_was_taken_stands_beside_it() -> None:
    sampled = Row(bench="b", case="c", metric="p99_s", unit="s", value=1.0, num_samples=37)
    assert as_json(sampled)["num_samples"] == 37
    assert "num_samples" not in as_json(MEASURED)
    for rows, is_there in (([MEASURED, sampled], True), ([MEASURED], False)):
        console = Console(width=140, record=True, file=io.StringIO())
        print_table(rows, console)
        words = console.export_text().split()
        assert ("n" in words, "37" in words) == (is_there, is_there)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1993.24, "1993"), (12.345, "12.3"), (1.3449, "1.34"), (0.0000213, "0.0000213"), (0, "0"), (None, "–")],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert show(value) == text


def test_commit_of_a_checkout_and_of_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", tmp_path)

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    outside = report.commit.__wrapped__()
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert outside not in head
    assert report.commit.__wrapped__() == head[:12]
    (tmp_path / "file").write_text("2")
    assert report.commit.__wrapped__() == head[:12] + "-dirty"
