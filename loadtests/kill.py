"""`python loadtests/kill.py --seed S --kills N [--quick] --json FILE`: kill parts of a running cluster in mid-stream.

A cluster of real processes is started on this machine. For each kill the same requests are streamed twice: once
undisturbed, then again while, at a seeded moment, one process is killed or stopped by a real signal. Both are compared
token by token, with logprobs, texts and ends. The next kill comes when the cluster is whole again, and before that no
attention worker may have a KV page in use (`pages_leaked`).

A kill counts only where it struck something: the worker had requests that another one went on with, Ray's nodes died of
their head's absence, what was struck was there and had to be started again. One that struck nothing is repeated.

`pause_p50_s` and `pause_p99_s` are over kills (`num_samples` of them, n in the table), of each the longest pause of any
stream: from the sending to the first token, or between two events, where that ended after the signal. A fault may touch
some of the streams only; theirs is the longest, or the kill is shown worse than it was. Of controller, Redis and Ray's
head no stream may pause: theirs is the longest gap of any stream while the requests are sent again and again, until the
cluster is whole. The baseline is the same of the undisturbed streams. `whole_p50_s` and `whole_p99_s` are from the
signal until the cluster is whole: the process is back, every worker serves, the experts are shared out, and after a
controller's fault another one leads.

What a gateway streams ends with it (`gateway_hung`): such a stream counts among `requests_failed`, with a `note`, and
is no fault where all that came of it was right and the same request, sent again when the gateway is back, is whole.

`expert_replica` has a cluster of its own, with two copies of each expert. `attention_4k` streams one request alone,
which fills the demo model's context: its pause is what the survivor takes to compute the prompt again. In
`controller_hung_expert` requests wait for experts that nobody holds, until the controller that hangs is replaced.

Exit code 0 only where every kill struck and nothing was lost, repeated, different, leaked or otherwise failed.

`--quick` leaves out what hangs, Ray's head, the controller by itself, and what has a cluster or a request of its own,
and says so in their rows: the start of a cluster takes half of its minute on two cores, a hang is one only after five
leases (experts, attention) or 15 s (a quarter of `orphan_timeout_s`), and Ray's head stays away for 8 s. They can share
no wait: what dies while Ray's head or the controller is away is not started again, and of two faults at once a pause
would be nobody's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its own folder is on the path then, not the packages'
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from cluster.control.model import DEMO_PATH
from cluster.errors import ForetokenError
from loadtests.cluster_process import LocalCluster, whole_cluster
from loadtests.faults import ENVIRONMENT, KINDS, Kind, look
from loadtests.kill_round import Round, one_round
from loadtests.measures import percentile
from loadtests.processes import BenchError
from loadtests.report import Row, print_table, write_json
from loadtests.running import ended_by_sigterm
from loadtests.token_streams import Difference
from loadtests.workload import word_ids

BENCH = "kill"
COUNTED = "kills"  # the metric that every kind has, done or not
START_S = 300.0
TURNS = 3  # of each kind, where nobody says how many kills
TRIES = 3  # of a kill that strikes nothing
QUICK = ("expert", "attention", "redis", "controller_expert")
CUT = "ended with their gateway, as docs/architecture.md has it; sent again they were whole"
NO_PROCESS = "no process of this kind runs here"


@dataclass(frozen=True)
class Options:
    seed: int
    kills: int
    quick: bool = False
    json_path: Path | None = None
    only: tuple[str, ...] = ()  # names of kinds; none: all

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if not self.left_out(kind))

    def left_out(self, kind: Kind) -> str:
        """The option that leaves this kind out; "": it is done."""
        if self.only:
            return "" if kind.name in self.only else "--only"
        return "--quick" if self.quick and kind.name not in QUICK else ""

    @property
    def output_tokens(self) -> tuple[int, int]:
        return (48, 80) if self.quick else (96, 192)


@dataclass
class Tally:
    """What the kills of one kind did."""

    kills: int = 0
    difference: Difference = field(default_factory=Difference)
    failed: int = 0
    cut: int = 0
    pages_leaked: int = 0
    pauses_s: list[float] = field(default_factory=list)
    undisturbed_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    num_missed: int = 0  # kills that were asked for and struck nothing at every try
    reason: str = ""  # why there was none, or fewer than asked for

    def add(self, done: Round) -> None:
        """A round: what its streams lost counts even where it struck nothing."""
        self.difference += done.difference
        self.failed += done.failed
        self.cut += done.cut
        self.pages_leaked += done.pages_leaked
        if not done.missed:
            self.kills += 1
            self.pauses_s.append(done.pause_s)
            self.undisturbed_s.append(done.undisturbed_s)
            self.whole_s.append(done.whole_s)

    def sum_up(self, other: Tally) -> None:
        self.kills += other.kills
        self.difference += other.difference
        self.failed += other.failed
        self.cut += other.cut
        self.pages_leaked += other.pages_leaked
        self.pauses_s += other.pauses_s
        self.undisturbed_s += other.undisturbed_s
        self.whole_s += other.whole_s
        self.num_missed += other.num_missed

    @property
    def faults(self) -> list[str]:
        """What should not have happened, in words."""
        found = [] if self.difference.is_none else [str(self.difference)]
        found += [f"{self.failed} requests failed"] * bool(self.failed)
        found += [f"{self.pages_leaked} KV pages leaked"] * bool(self.pages_leaked)
        return found + [f"{self.num_missed} kills struck nothing: {self.reason}"] * bool(self.num_missed)


def run(options: Options, tallies: dict[str, Tally], say: Callable[[str], None]) -> None:
    """`kills` kills, the kinds in seeded turns, into `tallies`. Raises `BenchError` where it cannot go on."""
    rng = random.Random(options.seed)
    order: list[Kind] | None = None  # not drawn yet
    for copies in sorted({kind.copies for kind in options.kinds}):
        if order is not None and all(kind.copies != copies for kind in order):
            continue
        say("starting a cluster" + f" with {copies} copies of each expert" * (copies > 1))
        started = time.monotonic()
        with whole_cluster(start_timeout_s=START_S, variables=ENVIRONMENT, expert_copies=copies) as cluster:
            say(f"it is whole after {time.monotonic() - started:.0f} s")
            if order is None:
                order = _drawn(options, _possible(options, cluster, tallies), rng, tallies)
            for number, kind in enumerate(order, start=1):
                if kind.copies == copies:
                    since_s = time.monotonic() - started
                    say(f"kill {number} of {options.kills}: {kind.name}, {since_s:.0f} s after the start")
                    kill_once(options, cluster, kind, rng, tallies[kind.name], say)


def _drawn(options: Options, possible: Sequence[Kind], rng: random.Random, tallies: dict[str, Tally]) -> list[Kind]:
    """The kills, in seeded turns of the kinds; those of one cluster one after the other."""
    order: list[Kind] = []
    while len(order) < options.kills and possible:
        order += rng.sample(possible, len(possible))
    order = order[: options.kills]
    for kind in possible:
        if kind not in order:
            tallies[kind.name].reason = f"{options.kills} kills in all: none of this kind was drawn"
    return sorted(order, key=lambda kind: kind.copies)


def _possible(options: Options, cluster: LocalCluster, tallies: dict[str, Tally]) -> list[Kind]:
    """The kinds that can be done; the others' tallies say why not."""
    now = look(cluster)
    if now is None:
        raise BenchError("the status of a whole cluster cannot be read")
    for kind in KINDS:
        if option := options.left_out(kind):
            tallies[kind.name].reason = f"left out by {option}"
        elif not kind.names(now):
            tallies[kind.name].reason = NO_PROCESS
    return [kind for kind in options.kinds if not tallies[kind.name].reason]


def kill_once(
    options: Options,
    cluster: LocalCluster,
    kind: Kind,
    rng: random.Random,
    tally: Tally,
    say: Callable[[str], None],
) -> None:
    """One kill that strikes something; after `TRIES` it is counted as not done."""
    words = word_ids(DEMO_PATH)
    for _ in range(TRIES):
        done = asyncio.run(one_round(cluster, kind, rng, words, options.output_tokens))
        tally.add(done)
        said = f"  {done.difference}, {done.pages_leaked} pages leaked"
        if done.failed:
            said += f", {done.failed} requests failed: {done.first_error}"
        if not done.missed:
            pause = f"longest pause {done.pause_s:.2f} s (undisturbed {done.undisturbed_s:.2f} s)"
            said += f", {done.cut} streams cut off" * bool(done.cut)
            say(f"{said}, {pause}, whole after {done.whole_s:.1f} s")
            return
        say(f"{said}; it struck nothing: {done.missed}")
    tally.num_missed += 1
    tally.reason = done.missed


def rows(tallies: dict[str, Tally]) -> list[Row]:
    """Every figure of every kind, then of all of them."""
    everything = Tally()
    for tally in tallies.values():
        everything.sum_up(tally)
    if not everything.kills:
        everything.reason = "no kill was done"
    return [row for name, tally in [*tallies.items(), ("all", everything)] for row in _rows(name, tally)]


def _rows(case: str, tally: Tally) -> list[Row]:
    difference = tally.difference
    note = "; ".join(kind.note for kind in KINDS if kind.name == case and kind.note)
    if tally.num_missed and tally.kills:
        note = f"{note}; {tally.num_missed} more struck nothing: {tally.reason}".removeprefix("; ")
    found = [Row(bench=BENCH, case=case, metric=COUNTED, unit="count", value=float(tally.kills), note=note)]
    if not tally.kills:
        found = [Row(bench=BENCH, case=case, metric=COUNTED, unit="count", value=0.0, reason=tally.reason)]
    counts = {
        "tokens_checked": difference.checked,
        "tokens_lost": difference.lost,
        "tokens_repeated": difference.repeated,
        "tokens_differing": difference.differing,
        "logprobs_differing": difference.logprobs,
        "texts_differing": difference.texts,
        "requests_failed": tally.failed + tally.cut,
        "pages_leaked": tally.pages_leaked,
    }
    was_tried = tally.kills or difference.checked  # otherwise nothing was found, which is not the same as nothing lost
    for metric, count in counts.items():
        value, reason = (float(count), "") if was_tried else (None, tally.reason)
        note = f"{tally.cut} {CUT}" if metric == "requests_failed" and tally.cut else ""
        found.append(Row(bench=BENCH, case=case, metric=metric, unit="count", value=value, note=note, reason=reason))
    times: tuple[tuple[str, list[float], list[float]], ...] = (
        ("pause", tally.pauses_s, tally.undisturbed_s),
        ("whole", tally.whole_s, []),
    )
    return found + [
        _time(case, name, percent, values, baselines, tally.reason)
        for name, values, baselines in times
        for percent in (50, 99)
    ]


def _time(case: str, name: str, percent: int, values: list[float], baselines: list[float], reason: str) -> Row:
    metric = f"{name}_p{percent}_s"
    if not values:
        return Row(bench=BENCH, case=case, metric=metric, unit="s", reason=reason)
    is_goal = (name, percent) == ("pause", 99)
    goal_s = next((kind.goal_s for kind in KINDS if is_goal and kind.name == case), None)
    return Row(
        bench=BENCH,
        case=case,
        metric=metric,
        unit="s",
        value=percentile(sorted(values), percent),
        baseline=percentile(sorted(baselines), percent) if baselines else None,
        num_samples=len(values),
        goal="" if goal_s is None else f"<= {goal_s:g}",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests/kill.py", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=0, help="of prompts, moments and victims")
    parser.add_argument(
        "--kills",
        type=int,
        help=f"in all; the kinds take turns (default: {TURNS} of each, with --quick 1)",
    )
    parser.add_argument("--quick", action="store_true", help=f"of {', '.join(QUICK)} only, and shorter streams")
    parser.add_argument(
        "--only", action="append", default=[], choices=[kind.name for kind in KINDS], help="of this kind; repeatable"
    )
    parser.add_argument("--json", type=Path, dest="json_path", help="write the rows there as well")
    given = parser.parse_args(argv)
    options = Options(given.seed, TURNS, given.quick, given.json_path, tuple(given.only))
    kills = len(options.kinds) * (1 if given.quick else TURNS) if given.kills is None else given.kills
    if kills < 1:
        parser.error(f"--kills must be at least 1, not {kills}")
    options = replace(options, kills=kills)
    console = Console(stderr=True)

    def say(text: str, style: str = "dim") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    if options.quick and kills > len(QUICK):
        say(f"{kills} kills take longer than the minute of --quick, which is for {len(QUICK)}")
    tallies = {kind.name: Tally() for kind in KINDS}
    end: str | None = None
    try:
        with ended_by_sigterm():
            run(options, tallies, say)
    except (BenchError, ForetokenError) as error:
        end = f"Error, after which no more was killed: {error}"
        for tally in tallies.values():
            tally.reason = tally.reason or "the run ended before"
    measured = rows(tallies)
    print_table([row for row in measured if row.value is not None or row.metric == COUNTED])
    if options.json_path is not None:
        write_json(measured, options.json_path)
    faults = [f"{name}: {fault}" for name, tally in tallies.items() for fault in tally.faults]
    for fault in faults:
        say(fault, "bold red")
    if end is not None:
        say(end, "bold red")
    return 1 if faults or end is not None else 0


if __name__ == "__main__":
    sys.exit(main())
