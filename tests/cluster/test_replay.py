"""The replay of a trace with real servers: one worker, then a cluster, each with every answer whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.replay import MEASURES, main
from loadtests.traces import AZURE_COLUMNS, AZURE_FOLDER
from tests.support.numerics import KERNELS_DIR

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(900)]

LENGTHS = ((40, 16), (8, 24), (120, 8), (30, 12))  # tokens of prompt and answer


def test_a_trace_is_replayed_against_one_worker_and_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KERNELS_DIR.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(KERNELS_DIR)
    lines = [
        ",".join(AZURE_COLUMNS),
        *(f"2023-11-16 18:15:46.{i}00000,{prompt},{output}" for i, (prompt, output) in enumerate(LENGTHS)),
    ]
    trace = tmp_path / AZURE_FOLDER / "AzureLLMInferenceTrace_conv.csv"
    trace.parent.mkdir()
    trace.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FORETOKEN_HOME", str(tmp_path))
    monkeypatch.setenv("FORETOKEN_DATA", str(tmp_path))
    written = tmp_path / "replay.json"
    assert main(["--seconds", "1", "--divisor", "1", "--local", "1", "--json", str(written)]) == 0
    rows = {row["metric"]: row for row in json.loads(written.read_text())}
    assert set(rows) == {metric for metric, *_ in MEASURES}
    assert (rows["requests_failed"]["value"], rows["requests_failed"]["baseline"]) == (0, 0)
    assert rows["output_throughput"]["value"] > 0
    assert rows["output_throughput"]["baseline"] > 0
    assert f"{len(LENGTHS)} requests" in rows["output_throughput"]["note"]
