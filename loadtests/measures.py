"""What a load run says about a server: the measures of the serving literature, under the keys of `vllm bench serve`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

PERCENTILES = (50, 90, 95, 99)


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a good answer keeps to; None: no bound."""

    ttft_s: float | None = None  # send to first token
    tpot_s: float | None = None  # mean time of a token after the first
    e2el_s: float | None = None  # send to last token


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times in seconds from the run's start."""

    due_s: float  # when it should have been sent
    sent_s: float
    token_times_s: list[float] = field(default_factory=list)  # of each event that carried tokens
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        return self.token_times_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None where there is no second token."""
        if self.output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]

    def meets(self, slo: Slo) -> bool:
        measured = ((self.ttft_s, slo.ttft_s), (self.tpot_s or 0.0, slo.tpot_s), (self.e2el_s, slo.e2el_s))
        return all(bound is None or value <= bound for value, bound in measured)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly between the two nearest (as numpy does)."""
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread_ms(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    """`mean_<name>_ms`, `median_…`, `std_…`, `max_…` and percentiles of times in seconds; None where there are none."""
    ordered = sorted(values_s)
    measures: dict[str, float | None] = dict.fromkeys(
        f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "max", *(f"p{p}" for p in PERCENTILES))
    )
    if ordered:
        measures[f"mean_{name}_ms"] = 1e3 * statistics.fmean(ordered)
        measures[f"median_{name}_ms"] = 1e3 * percentile(ordered, 50)
        measures[f"std_{name}_ms"] = 1e3 * statistics.pstdev(ordered)
        measures[f"max_{name}_ms"] = 1e3 * ordered[-1]
        measures |= {f"p{p}_{name}_ms": 1e3 * percentile(ordered, p) for p in PERCENTILES}
    return measures


def most_at_once(records: Sequence[Record]) -> int:
    """The most requests that were under way at one moment."""
    events = sorted([(r.sent_s, 1) for r in records] + [(r.token_times_s[-1], -1) for r in records])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def summarize(records: Sequence[Record], *, model: str, slo: Slo | None = None) -> dict[str, Any]:
    """Throughput, latencies (milliseconds) and, with an SLO, goodput; then each request's own figures (seconds).

    The duration runs from the start of the load to the last token. Failed requests count in `failed` only.
    """
    done = [record for record in records if not record.error]
    duration = max((record.token_times_s[-1] for record in done), default=0.0)
    output_tokens = sum(record.output_tokens for record in done)
    input_tokens = sum(record.input_tokens for record in done)

    def rate(count: int) -> float:
        return count / duration if duration else 0.0

    return {
        "model_id": model,
        "num_prompts": len(records),
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration": duration,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(done)),
        "request_goodput": None if slo is None else rate(sum(record.meets(slo) for record in done)),
        "output_throughput": rate(output_tokens),
        "total_token_throughput": rate(input_tokens + output_tokens),
        "max_concurrent_requests": most_at_once(done),
        **spread_ms("ttft", [record.ttft_s for record in done]),
        **spread_ms("tpot", [tpot for record in done if (tpot := record.tpot_s) is not None]),
        **spread_ms("itl", [itl for record in done for itl in record.itls_s]),
        **spread_ms("e2el", [record.e2el_s for record in done]),
        **spread_ms("send_delay", [record.sent_s - record.due_s for record in records]),
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "start_times": [record.sent_s for record in records],
        "ttfts": [None if record.error else record.ttft_s for record in records],
        "itls": [record.itls_s for record in records],
        "errors": [record.error for record in records],
    }
