"""Traces: what is read, what is refused, and how they are shortened."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load
from cluster.errors import ConfigError, InvalidValueError
from loadtests.traces import AZURE_FOLDER, Arrival, azure_2023, first_seconds, shortened

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def _data(folder: Path, text: str) -> Path:
    (folder / AZURE_FOLDER).mkdir()
    (folder / AZURE_FOLDER / "AzureLLMInferenceTrace_conv.csv").write_text(text)
    return folder


def test_times_count_from_the_first_request(tmp_path: Path) -> None:
    text = HEAD + "2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.7500000,396,109\n"
    assert azure_2023(_data(tmp_path, text), "conv") == [Arrival(0.0, 374, 44), Arrival(2.25, 396, 109)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the first line must be"),
        ("a,b,c\n", "the first line must be"),
        (HEAD + "yesterday,1,2\n", r"line 2: Invalid isoformat"),
        (HEAD + "2023-11-16 18:00:00,1\n", r"line 2: not enough values"),
        (HEAD + "2023-11-16 18:00:00,1,2\n2023-11-16 18:00:01,1,-2\n", r"line 3: times must ascend"),
        (HEAD + "2023-11-16 18:00:01,1,2\n2023-11-16 18:00:00,1,2\n", r"line 3: times must ascend"),
    ],
)
def test_what_is_no_trace_is_named_by_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InvalidValueError, match=complaint):
        azure_2023(_data(tmp_path, text), "conv")


def test_a_missing_trace_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"AzureLLMInferenceTrace_code\.csv.*set FORETOKEN_DATA"):
        azure_2023(tmp_path, "code")


def test_shortened_lengths_fit_the_context_and_are_never_empty() -> None:
    arrivals = [Arrival(0.0, 4000, 400), Arrival(1.0, 3, 0), Arrival(2.0, 800, 16)]
    assert shortened(arrivals, 8.0, 200) == [Arrival(0.0, 150, 50), Arrival(1.0, 1, 1), Arrival(2.0, 100, 2)]
    with pytest.raises(InvalidValueError, match="divisor"):
        shortened(arrivals, 0.5, 200)


def test_the_first_seconds_end_before_their_bound() -> None:
    arrivals = [Arrival(0.0, 1, 1), Arrival(59.9, 1, 1), Arrival(60.0, 1, 1)]
    assert first_seconds(arrivals, 60.0) == arrivals[:2]


@pytest.mark.needs("traces")
@pytest.mark.parametrize(("kind", "num"), [("conv", 19366), ("code", 8819)])
def test_the_real_traces_are_read_whole(kind: str, num: int) -> None:
    arrivals = azure_2023(load().data, kind)  # type: ignore[arg-type]
    assert len(arrivals) == num
    assert 3000 < arrivals[-1].at_s < 3700
