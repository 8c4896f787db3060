"""The arithmetic of latency, throughput and goodput."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.measures import Record, Slo, percentile, spread_ms, summarize

finite = st.floats(0, 1e6)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_spread_of_known_values() -> None:
    spread = spread_ms("ttft", [0.003, 0.001, 0.002, 0.004])
    assert spread["mean_ttft_ms"] == pytest.approx(2.5)
    assert spread["median_ttft_ms"] == pytest.approx(2.5)
    assert spread["std_ttft_ms"] == pytest.approx(1.118, abs=1e-3)
    assert spread["max_ttft_ms"] == pytest.approx(4.0)
    assert spread["p90_ttft_ms"] == pytest.approx(3.7)
    assert spread["p99_ttft_ms"] == pytest.approx(3.97)
    assert set(spread_ms("itl", [])) == {key.replace("ttft", "itl") for key in spread}
    assert set(spread_ms("itl", []).values()) == {None}


FAST = Record(due_s=0.0, sent_s=0.0, token_times_s=[0.1, 0.2, 0.3], input_tokens=8, output_tokens=3)
SLOW = Record(due_s=0.5, sent_s=0.6, token_times_s=[1.6, 1.8, 2.0], input_tokens=4, output_tokens=5)
FAILED = Record(due_s=0.1, sent_s=0.1, input_tokens=2, error="HTTP 500")


def test_summary_of_three_requests_by_hand() -> None:
    summary = summarize([FAST, SLOW, FAILED], model="m", slo=Slo(ttft_s=0.5, tpot_s=0.2))
    assert (summary["num_prompts"], summary["completed"], summary["failed"]) == (3, 2, 1)
    assert summary["duration"] == 2.0
    assert summary["total_output_tokens"] == 8
    assert summary["total_input_tokens"] == 12
    assert summary["output_throughput"] == 4.0
    assert summary["total_token_throughput"] == 10.0
    assert summary["request_throughput"] == 1.0
    assert summary["request_goodput"] == 0.5
    assert summary["max_concurrent_requests"] == 1
    assert summary["ttfts"] == [pytest.approx(0.1), pytest.approx(1.0), None]
    assert summary["mean_ttft_ms"] == pytest.approx(550)
    # An event may carry several tokens: the time per token counts tokens, the time between events counts events.
    assert summary["mean_tpot_ms"] == pytest.approx((100 + 100) / 2)
    assert summary["max_itl_ms"] == pytest.approx(200)
    assert summary["max_e2el_ms"] == pytest.approx(1400)
    assert summary["max_send_delay_ms"] == pytest.approx(100)
    assert summary["errors"] == ["", "", "HTTP 500"]


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), 2),
        (Slo(ttft_s=1.1), 2),
        (Slo(ttft_s=0.9), 1),
        (Slo(tpot_s=0.05), 0),
        (Slo(e2el_s=0.4), 1),
    ],
)
def test_goodput_counts_who_keeps_every_bound(slo: Slo, good: int) -> None:
    assert summarize([FAST, SLOW], model="m", slo=slo)["request_goodput"] == good / 2.0


def test_without_an_slo_there_is_no_goodput() -> None:
    assert summarize([FAST], model="m")["request_goodput"] is None


def test_one_token_has_no_time_per_token() -> None:
    one = Record(due_s=0.0, sent_s=0.0, token_times_s=[0.2], output_tokens=1)
    assert one.tpot_s is None
    assert one.meets(Slo(tpot_s=0.001))
    assert summarize([one], model="m")["mean_tpot_ms"] is None


def test_requests_at_once() -> None:
    starts_ends = [(0.0, 1.0), (0.5, 2.0), (0.6, 0.9), (1.0, 3.0)]  # the last begins as the first ends
    records = [Record(s, s, [e], output_tokens=1) for s, e in starts_ends]
    assert summarize(records, model="m")["max_concurrent_requests"] == 3


def test_nothing_completed() -> None:
    summary = summarize([FAILED], model="m", slo=Slo(ttft_s=1.0))
    assert summary["duration"] == summary["output_throughput"] == summary["request_goodput"] == 0.0
    assert summary["p99_ttft_ms"] is None
