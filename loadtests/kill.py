"""`python loadtests/kill.py --seed S --kills N [--quick] --json FILE`: kill parts of a running cluster in mid-stream.

A cluster of real processes is started on this machine. For each kill the same completions are streamed twice: once
undisturbed, then again while, at a seeded moment, one process is killed or stopped by a real signal. Both are compared
token by token. A pause is a stream's longest wait between two events from the signal on; the next kill comes when the
cluster is whole again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its own folder is on the path then, not the packages'
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import aiohttp
from rich.console import Console

from cluster.control.model import DEMO_PATH
from cluster.errors import ForetokenError
from loadtests.cluster_process import LocalCluster, local_cluster
from loadtests.faults import ENVIRONMENT, KINDS, Kind
from loadtests.measures import percentile
from loadtests.processes import BenchError
from loadtests.report import Row, print_table, write_json
from loadtests.token_streams import Difference, TokenStream, compare, read_stream
from loadtests.workload import random_prompts, word_ids

BENCH = "kill"
START_S = 300.0
STREAM_S = 180.0  # one stream, its pauses included
WHOLE_S = 180.0  # until a cluster is whole again
MOST_TOKENS_PER_S = 120  # of one stream: a kill that lasts must not outlast what runs
EARLY_SHARE = 0.2  # of the kills, before the first token:
SENT_S = 0.005  # so long after the requests were sent
SETTLE_S = 0.5  # from the streams' end until what died is known to have died
COUNTS = ("kills", "tokens_checked", "tokens_lost", "tokens_repeated", "tokens_differing", "requests_failed")
PAUSES = ("pause_p50_s", "pause_p99_s")


@dataclass(frozen=True)
class Options:
    seed: int
    kills: int
    quick: bool = False
    json_path: Path | None = None

    @property
    def num_streams(self) -> int:
        return 2 if self.quick else 4

    @property
    def output_tokens(self) -> tuple[int, int]:
        return (48, 80) if self.quick else (96, 192)


@dataclass
class Tally:
    """What the kills of one kind did."""

    kills: int = 0
    difference: Difference = field(default_factory=lambda: Difference(0))
    failed: int = 0
    pauses_s: list[float] = field(default_factory=list)
    reason: str = ""  # why there was none


def completions(
    options: Options, rng: random.Random, words: Sequence[int], model: str, lasts_s: float
) -> list[dict[str, Any]]:
    """Greedy and sampled requests in turn, of mixed lengths, to a number of tokens that takes longer than `lasts_s`."""
    longer = round(lasts_s * MOST_TOKENS_PER_S)
    lengths = [rng.randint(8, 160) for _ in range(options.num_streams)]
    return [
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": rng.randint(*options.output_tokens) + longer,
            "ignore_eos": True,
            "temperature": 0.0 if index % 2 == 0 else 0.9,
            "seed": rng.randrange(2**31),
        }
        for index, prompt in enumerate(random_prompts(words, lengths, rng.randrange(2**31)))
    ]


async def stream_all(
    url: str, bodies: Sequence[dict[str, Any]], on_tokens: Callable[[int], None] = lambda _: None
) -> list[TokenStream]:
    streams = [TokenStream() for _ in bodies]
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        for body, stream in zip(bodies, streams, strict=True):
            group.create_task(read_stream(session, f"{url}/v1/completions", body, stream, STREAM_S, on_tokens))
    return streams


async def disturbed(
    url: str, bodies: Sequence[dict[str, Any]], strike: Callable[[], None], at_tokens: int
) -> tuple[list[TokenStream], float]:
    """Stream all of `bodies`, and call `strike` once `at_tokens` tokens have come; -> streams, and when that was."""
    num_tokens = 0
    struck_s = float("inf")

    def count(tokens: int) -> None:
        nonlocal num_tokens, struck_s
        num_tokens += tokens
        if num_tokens >= at_tokens and struck_s == float("inf"):
            struck_s = time.monotonic()
            strike()

    early = asyncio.get_running_loop().call_later(SENT_S, count, 0)
    streams = await stream_all(url, bodies, count)
    early.cancel()
    return streams, struck_s


def one_kill(cluster: LocalCluster, kind: Kind, options: Options, rng: random.Random, words: Sequence[int]) -> Tally:
    """Undisturbed, disturbed, compared. Raises `BenchError` where the cluster does not become whole again."""
    bodies = completions(options, rng, words, cluster.server.model, kind.lasts_s)
    expected = asyncio.run(stream_all(cluster.server.base_url, bodies))
    if wrong := next((stream.error for stream in expected if stream.error), ""):
        raise BenchError(f"an undisturbed request failed: {wrong}")
    total = sum(body["max_tokens"] for body in bodies)
    strike = kind.prepare(cluster, rng)
    at_tokens = 0 if rng.random() < EARLY_SHARE else rng.randint(1, total // 4)
    got, struck_s = asyncio.run(disturbed(cluster.server.base_url, bodies, strike, at_tokens))
    tally = Tally(kills=1)
    for one, other in zip(got, expected, strict=True):
        tally.difference += compare(one.ids, other.ids)
        tally.failed += bool(one.error)
        if one.times_s and one.times_s[-1] > struck_s:
            tally.pauses_s.append(one.pause_s(struck_s))
    time.sleep(max(SETTLE_S, struck_s + kind.lasts_s - time.monotonic()))
    cluster.wait_until_whole(WHOLE_S)
    return tally


def run(options: Options, say: Callable[[str], None]) -> dict[str, Tally]:
    """`kills` kills, the kinds in seeded turns. Raises `BenchError` where no cluster can be had."""
    rng = random.Random(options.seed)
    words = word_ids(DEMO_PATH)
    tallies = {kind.name: Tally() for kind in KINDS}
    say("starting a cluster")
    started = time.monotonic()
    with local_cluster(start_timeout_s=START_S, variables=ENVIRONMENT) as cluster:
        cluster.wait_until_whole(WHOLE_S)
        possible = []
        for kind in KINDS:
            tallies[kind.name].reason = kind.impossible(cluster)
            if not tallies[kind.name].reason:
                possible.append(kind)
        order: list[Kind] = []
        while len(order) < options.kills and possible:
            order += rng.sample(possible, len(possible))
        for number, kind in enumerate(order[: options.kills], start=1):
            say(f"kill {number} of {options.kills}: {kind.name}, {time.monotonic() - started:.0f} s after the start")
            done = one_kill(cluster, kind, options, rng, words)
            sum_up(tallies[kind.name], done)
            say(f"  {done.difference}, longest pause {max(done.pauses_s, default=0.0):.2f} s")
    for tally in tallies.values():
        if not tally.kills and not tally.reason:
            tally.reason = f"{options.kills} kills in all: none of this kind was drawn"
    return tallies


def sum_up(into: Tally, tally: Tally) -> None:
    into.kills += tally.kills
    into.difference += tally.difference
    into.failed += tally.failed
    into.pauses_s += tally.pauses_s


def rows(tallies: dict[str, Tally]) -> list[Row]:
    """Every figure of every kind, then of all of them."""
    everything = Tally()
    for tally in tallies.values():
        sum_up(everything, tally)
    return [row for name, tally in [*tallies.items(), ("all", everything)] for row in _rows(name, tally)]


def _rows(case: str, tally: Tally) -> list[Row]:
    difference = tally.difference
    counts = (difference.checked, difference.lost, difference.repeated, difference.differing, tally.failed)
    found = [Row(bench=BENCH, case=case, metric=COUNTS[0], unit="count", value=float(tally.kills), reason=tally.reason)]
    found += [  # without a kill nothing was found, which is not the same as nothing lost
        Row(
            bench=BENCH,
            case=case,
            metric=metric,
            unit="count",
            value=float(count) if tally.kills else None,
            reason=tally.reason,
        )
        for metric, count in zip(COUNTS[1:], counts, strict=True)
    ]
    ordered = sorted(tally.pauses_s)
    none = tally.reason or "no stream was under way when the signal came"
    return found + [
        Row(bench=BENCH, case=case, metric=metric, unit="s", value=percentile(ordered, percent))
        if ordered
        else Row(bench=BENCH, case=case, metric=metric, unit="s", reason=none)
        for metric, percent in zip(PAUSES, (50, 99), strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests/kill.py", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=0, help="of prompts, moments and victims")
    parser.add_argument("--kills", type=int, default=3 * len(KINDS), help="in all; the kinds take turns")
    parser.add_argument("--quick", action="store_true", help="one kill of each kind, fewer and shorter streams")
    parser.add_argument("--json", type=Path, dest="json_path", help="write the rows there as well")
    given = parser.parse_args(argv)
    if given.kills < 1:
        parser.error(f"--kills must be at least 1, not {given.kills}")
    kills = min(given.kills, len(KINDS)) if given.quick else given.kills
    options = Options(given.seed, kills, given.quick, given.json_path)
    console = Console(stderr=True)
    try:
        measured = rows(run(options, lambda text: console.print(text, style="dim", highlight=False)))
    except (BenchError, ForetokenError) as error:
        console.print(f"Error: {error}", style="red", highlight=False)
        return 1
    print_table(measured)
    if options.json_path is not None:
        write_json(measured, options.json_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
