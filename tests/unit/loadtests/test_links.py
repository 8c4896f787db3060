"""The links' bench, at its least effort: what it says is measured between real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.links import HUNG_DEADLINE_S, main


def test_it_measures_trips_beside_the_bare_pair_and_how_soon_a_peer_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    assert main(["--quick", "--json", str(path)]) == 0
    rows = {(row["case"], row["metric"]): row for row in json.loads(path.read_text())}
    for case in ("1x2048", "64x2048"):
        trip = rows[case, "round_trip_s"]
        assert 0 < trip["value"] < 1
        assert 0 < trip["baseline"] < 1
    assert rows["peer killed", "error_p50_s"]["value"] < 0.9 * HUNG_DEADLINE_S
    killed = {metric: row["value"] for (case, metric), row in rows.items() if case == "peer killed"}
    assert 0 < killed["end_p50_s"] < HUNG_DEADLINE_S  # with one peer its median is what it is
    assert killed["error_beyond_end_p50_s"] == pytest.approx(killed["error_p50_s"] - killed["end_p50_s"])
    assert ("peer hung", "end_p50_s") not in rows
    assert rows["peer hung", "error_p50_s"]["value"] > 0.9 * HUNG_DEADLINE_S
