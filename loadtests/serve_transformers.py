"""The cases of `bench serve` that set our server beside transformers."""

from __future__ import annotations

from typing import Any

from loadtests.processes import BenchError, LineProcess, Server
from loadtests.report import Row
from loadtests.runs import NUM_REQUESTS, RUN_S, START_S, Bench, Case, ratio, ratio_rows, throughput_rows
from loadtests.workload import Poisson

POISSON_RATE = 256.0  # arrivals a second: the last has come before even we are done with the first


class TransformersCases:
    """Our server beside transformers."""

    def __init__(self, bench: Bench, server: Server) -> None:
        self.bench = bench
        self.server = server
        self.kinds: dict[str, Any] = {}
        self.peer: LineProcess | None = None
        self.version = ""

    def cases(self) -> list[Case]:
        batch, sequential, continuous, single = (
            "burst32/transformers_batch",
            "poisson32/transformers_sequential",
            "poisson32/transformers_continuous",
            "single/transformers",
        )
        return [
            Case((ratio(batch),), lambda: self._batch(batch)),
            Case((ratio(sequential),), lambda: self._poisson(sequential, "sequential", "single", ">= 8")),
            Case((ratio(continuous),), lambda: self._poisson(continuous, "continuous", "continuous", "")),
            Case((ratio(single, "tpot_ratio"),), lambda: self._tpot(single)),
            Case((ratio(single, "prefill_ratio"),), lambda: self._prefill(single)),
        ]

    def start(self, peer: LineProcess) -> None:
        """Load the model and find its fastest implementations."""
        bench = self.bench
        bench.say("transformers: loading")
        loaded = peer.ask(
            {"op": "load", "model": str(bench.options.model_path), "num_threads": bench.num_threads}, START_S
        )
        self.version = loaded["version"]
        bench.say("transformers: a short trial of its implementations")
        num, prompt, output, prefill = bench.scale.trial
        self.kinds = peer.ask(
            {
                "op": "trial",
                "prompts": bench.prompts([prompt] * num),
                "prompt": bench.prompts([prefill])[0],
                "num_tokens": output,
            },
            RUN_S,
        )
        self.peer = peer

    def note(self, kind: str, what: str) -> str:
        chosen = self.kinds[kind]
        experts = f", experts {chosen['experts']}" if chosen["experts"] else ""
        return (
            f"transformers {self.version}, {what}, fp32, {self.bench.num_threads} threads, "
            f"attention {chosen['attention']}{experts}"
        )

    def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert self.peer is not None
        return self.peer.ask({"op": op, **arguments}, RUN_S)

    def _throughput(self, op: str, **arguments: Any) -> float:
        answer = self._ask(op, **arguments)
        return float(answer["output_tokens"] / answer["duration_s"])

    def _batch(self, case: str) -> list[Row]:
        bench = self.bench

        def pair() -> tuple[float, float]:
            load = bench.uniform(NUM_REQUESTS, bench.scale.burst)
            ours = bench.throughput(self.server, load)
            return ours, self._throughput("batch", prompts=load.prompts, num_tokens=load.num_tokens[0])

        pairs = bench.pairs(case, bench.scale.pairs, pair)
        return throughput_rows(case, pairs, self.note("batch", "one generate of 32"), ">= 1.3")

    def _poisson(self, case: str, op: str, kind: str, goal: str) -> list[Row]:
        bench = self.bench
        if kind not in self.kinds:
            raise BenchError(f"transformers {self.version} does not run its {op} batching on this machine")

        def pair() -> tuple[float, float]:
            load = bench.uniform(NUM_REQUESTS, bench.scale.poisson, Poisson(POISSON_RATE))
            ours = bench.throughput(self.server, load)
            theirs = self._throughput(op, prompts=load.prompts, num_tokens=load.num_tokens, times_s=load.times_s)
            return ours, theirs

        pairs = bench.pairs(case, bench.scale.slow_pairs, pair)
        what = {"sequential": "one request after another", "continuous": "continuous batching"}[op]
        return throughput_rows(case, pairs, self.note(kind, what), goal)

    def _tpot(self, case: str) -> list[Row]:
        bench = self.bench

        def pair() -> tuple[float, float]:
            load = bench.uniform(1, bench.scale.single)
            ours = bench.send(self.server, load)["median_tpot_ms"] / 1e3
            return ours, self._ask("single", prompt=load.prompts[0], num_tokens=load.num_tokens[0])["tpot_s"]

        pairs = bench.pairs(f"{case} tpot", bench.scale.pairs, pair)
        return ratio_rows(case, "tpot_ratio", "tpot_s", "s", pairs, self.note("single", "alone"), "<= 0.5")

    def _prefill(self, case: str) -> list[Row]:
        bench = self.bench

        def pair() -> tuple[float, float]:
            load = bench.uniform(1, (bench.scale.prefill, 1))
            ours = bench.send(self.server, load)["median_ttft_ms"] / 1e3
            return ours, self._ask("single", prompt=load.prompts[0], num_tokens=1)["ttft_s"]

        pairs = bench.pairs(f"{case} prefill", bench.scale.pairs, pair)
        note = self.note("prefill", f"a prompt of {bench.scale.prefill} tokens to its first token")
        return ratio_rows(case, "prefill_ratio", "prefill_s", "s", pairs, note, "<= 1")
