"""What the cases of `bench serve` share: how much work a row is, the runs themselves, and the rows they become."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.control.model import DEMO_PATH
from cluster.machine import this_machine
from loadtests.peers.llama_cpp import LlamaCpp
from loadtests.processes import BenchError, LineProcess, Server, own_server
from loadtests.report import Row
from loadtests.workload import Arrivals, Burst, LoadRequest, random_prompts, word_ids

BENCH = "serve"
GREEDY = {"temperature": 0, "ignore_eos": True}
NUM_REQUESTS = 32
START_S = 600.0  # deadlines: of a server's start,
RUN_S = 1800.0  # of one run
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """How much work each row is. Lengths in tokens, `pairs` of interleaved runs."""

    burst: tuple[int, int]  # prompt, output
    poisson: tuple[int, int]
    single: tuple[int, int]
    prefill: int
    mixed_prompts: tuple[int, int]  # shortest, longest
    mixed_outputs: tuple[int, int]
    trial: tuple[int, int, int, int]  # sequences, prompt, output, tokens of the prefill
    pairs: int
    slow_pairs: int  # where the baseline takes several times as long as we do
    starts: int  # of `first_token_s`


FULL = Scale((64, 128), (64, 96), (64, 128), 512, (8, 32), (16, 256), (NUM_REQUESTS, 64, 16, 512), 5, 3, 3)
QUICK = Scale((32, 32), (32, 32), (32, 32), 256, (8, 32), (8, 64), (NUM_REQUESTS, 8, 8, 128), 3, 1, 1)


@dataclass(frozen=True)
class Options:
    quick: bool = False
    json_path: Path | None = None
    base_url: str | None = None
    model: str | None = None  # None: the demo model
    llama: LlamaCpp | None = None

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    @property
    def model_path(self) -> Path:
        return DEMO_PATH if self.model is None else Path(self.model)


@dataclass(frozen=True)
class Load:
    """Requests and when they come; `num_tokens` of output each."""

    prompts: list[list[int]]
    num_tokens: list[int]
    arrivals: Arrivals = Burst()
    seed: int = 0

    @property
    def times_s(self) -> list[float]:
        return [time_s for time_s, _ in zip(self.arrivals.times_s(self.seed), self.prompts, strict=False)]


class Bench:
    """What all cases use: the words, the load generator, the number of threads, and where progress goes."""

    def __init__(self, options: Options, generator: LineProcess, say: Callable[[str], None]) -> None:
        self.options = options
        self.scale = options.scale
        self.words = word_ids(options.model_path)
        self.num_threads = this_machine().num_usable_cores
        self.say = say
        self._generator = generator
        self._seed = 0

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """New prompts at each call: no prefix cache knows them."""
        self._seed += 1
        return random_prompts(self.words, lengths, self._seed)

    def uniform(self, num: int, shape: tuple[int, int], arrivals: Arrivals | None = None) -> Load:
        prompt, output = shape
        return Load(self.prompts([prompt] * num), [output] * num, arrivals or Burst(), self._seed)

    def server(self, *flags: str) -> contextlib.AbstractContextManager[Server]:
        return own_server(self.options.model, self.words[:8], *flags, num_threads=self.num_threads, deadline_s=START_S)

    def send(self, server: Server, load: Load, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The load's measures. Raises `BenchError` where a request failed or was cut short: that is no measurement."""
        requests = [
            LoadRequest(prompt=list(prompt), max_tokens=count)
            for prompt, count in zip(load.prompts, load.num_tokens, strict=True)
        ]
        job = {
            "base_url": server.base_url,
            "model": server.model,
            "requests": requests,
            "arrivals": load.arrivals,
            "seed": load.seed,
            "body": GREEDY | (body or {}),
            "timeout_s": RUN_S,
        }
        result = self._generator.ask(job, RUN_S)
        if result["output_lens"] != load.num_tokens:
            error = next(filter(None, result["errors"]), "an answer was shorter than asked for")
            raise BenchError(f"{result['failed']} of {len(requests)} requests failed at {server.base_url}: {error}")
        return result

    def throughput(self, server: Server, load: Load, body: dict[str, Any] | None = None) -> float:
        return float(self.send(server, load, body)["output_throughput"])

    def pairs(self, case: str, count: int, run: Callable[[], tuple[T, T]]) -> list[tuple[T, T]]:
        """`run` makes one pair: ours, then theirs."""
        done = []
        for number in range(1, count + 1):
            self.say(f"{case}: {number} of {count}")
            done.append(run())
        return done


# ------------------------------------------------------------------------------------------------------------- rows


def ratio_rows(
    case: str, metric: str, measured: str, unit: str, pairs: Sequence[tuple[float, float]], note: str, goal: str = ""
) -> list[Row]:
    """The median of the pairs' ratios (ours / theirs), then the medians of both sides."""
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return [
        Row(bench=BENCH, case=case, metric=metric, unit="ratio", value=ratio, baseline=1.0, note=note, goal=goal),
        Row(bench=BENCH, case=case, metric=measured, unit=unit, value=ours, baseline=theirs),
    ]


def throughput_rows(case: str, pairs: Sequence[tuple[float, float]], note: str, goal: str = "") -> list[Row]:
    return ratio_rows(case, "throughput_ratio", "output_throughput", "tokens/s", pairs, note, goal)


def unmeasured(case: str, metric: str, reason: str, unit: str = "ratio") -> Row:
    return Row(bench=BENCH, case=case, metric=metric, unit=unit, reason=reason)


@dataclass(frozen=True)
class Case:
    """Rows that stand or fall together: `(case, metric, unit)` of each that must appear, measured or not."""

    promised: tuple[tuple[str, str, str], ...]
    measure: Callable[[], list[Row]]

    def rows(self) -> list[Row]:
        """The measured rows, or the promised ones with the reason for their absence."""
        try:
            return self.measure()
        except BenchError as error:
            return self.without(str(error))

    def without(self, reason: str) -> list[Row]:
        return [unmeasured(case, metric, reason, unit) for case, metric, unit in self.promised]


def ratio(case: str, metric: str = "throughput_ratio") -> tuple[str, str, str]:
    return case, metric, "ratio"
