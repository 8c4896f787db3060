"""`python -m loadtests.replay`: the first minutes of a real trace, against one worker and against a cluster.

Open loop: requests come when the trace says, however slow the answers are. Prompts are random words of the trace's
lengths, answers are as long as the trace's; both are shortened by one divisor where the model's context asks for it.
Both servers run on this machine, one after the other, on the same processors: what the cluster's row shows is what the
exchange between its processes costs, not what more machines would gain.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cluster.config import load as load_settings
from cluster.control.model import DEMO_PATH
from cluster.errors import ConfigError, ForetokenError
from cluster.machine import this_machine
from loadtests.cluster_process import own_environment, whole_cluster
from loadtests.measures import Slo
from loadtests.processes import BenchError, LineProcess, Server, own_server
from loadtests.report import Row, print_table, write_json
from loadtests.running import ended_by_sigterm
from loadtests.traces import Arrival, azure_2023, first_seconds, shortened
from loadtests.workload import Listed, LoadRequest, random_prompts, word_ids

BENCH = "replay"
START_S = 300.0
RUN_S = 600.0
SLO = Slo(ttft_s=1.0, tpot_s=0.1)  # a reader does not wait, and is not overtaken
MEASURES = (  # metric, unit, key of the generator's result, factor
    ("output_throughput", "tokens/s", "output_throughput", 1.0),
    ("goodput", "requests/s", "request_goodput", 1.0),
    ("ttft_p50", "s", "median_ttft_ms", 1e-3),
    ("ttft_p99", "s", "p99_ttft_ms", 1e-3),
    ("tpot_p50", "s", "median_tpot_ms", 1e-3),
    ("tpot_p99", "s", "p99_tpot_ms", 1e-3),
    ("requests_failed", "requests", "failed", 1.0),
    ("send_delay_p99", "s", "p99_send_delay_ms", 1e-3),
)


@dataclass(frozen=True)
class Options:
    trace: Literal["conv", "code"] = "conv"
    seconds: float = 120.0
    divisor: float = 4.0
    seed: int = 0
    local: int = 3  # Ray nodes
    json_path: Path | None = None

    @property
    def case(self) -> str:
        return f"azure-2023-{self.trace}/{self.seconds:g}s/{self.divisor:g}"


def job(server: Server, arrivals: Sequence[Arrival], words: Sequence[int], seed: int) -> dict[str, Any]:
    """What the generator is asked: the same prompts at the same times for every server."""
    prompts = random_prompts(words, [arrival.prompt_tokens for arrival in arrivals], seed)
    return {
        "base_url": server.base_url,
        "model": server.model,
        "requests": [
            LoadRequest(prompt=list(prompt), max_tokens=arrival.output_tokens)
            for prompt, arrival in zip(prompts, arrivals, strict=True)
        ],
        "arrivals": Listed(at_s=[arrival.at_s for arrival in arrivals]),
        "body": {"temperature": 0, "ignore_eos": True},
        "slo": SLO,
        "timeout_s": RUN_S,
    }


def rows(options: Options, one: dict[str, Any], many: dict[str, Any], num_requests: int) -> list[Row]:
    """The cluster's figures beside one worker's."""
    shape = f"{num_requests} requests; prompts and answers 1/{options.divisor:g} of the trace's"
    bounds = f"good: first token within {SLO.ttft_s:g} s, then {SLO.tpot_s:g} s a token"
    note = f"cluster (value) beside one worker (baseline), same machine; {shape}; {bounds}"
    found = []
    for metric, unit, key, factor in MEASURES:
        row = partial(Row, bench=BENCH, case=options.case, metric=metric, unit=unit)
        if one[key] is None or many[key] is None:
            found.append(row(reason="no request of the trace had what this is measured by"))
        else:
            found.append(row(value=many[key] * factor, baseline=one[key] * factor, note="" if found else note))
    return found


def run(options: Options, say: Callable[[str], None]) -> list[Row]:
    """Replay against both. Raises `BenchError` where a server does not serve, `ConfigError` where there is no trace."""
    trace = azure_2023(load_settings().data, options.trace)
    arrivals = shortened(first_seconds(trace, options.seconds), options.divisor, max_tokens=2048)
    if not arrivals:
        text = f"the trace {options.trace} has no request in its first {options.seconds:g} s"
        raise ConfigError(text, param="seconds")
    words = word_ids(DEMO_PATH)
    num_threads = this_machine().num_usable_cores

    @contextlib.contextmanager
    def cluster() -> Iterator[Server]:
        with whole_cluster(options.local, start_timeout_s=START_S) as started:
            yield started.server

    alone = own_server(None, words[:8], num_threads=num_threads, deadline_s=START_S, env=own_environment())
    results = []
    with LineProcess("loadtests.generator", "--lines") as generator:
        for name, server in (
            ("one worker", alone),
            ("the cluster", cluster()),
        ):
            say(f"starting {name}")
            with server as started:
                say(f"{len(arrivals)} requests in {options.seconds:g} s against {name}")
                results.append(generator.ask(job(started, arrivals, words, options.seed), RUN_S + options.seconds))
    one, many = results
    return rows(options, one, many, len(arrivals))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests.replay", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trace", choices=("conv", "code"), default=Options.trace, help="chat or code completion")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of the trace, from its start")
    parser.add_argument(
        "--divisor", type=float, default=Options.divisor, help="prompts and answers are shorter by this"
    )
    parser.add_argument("--seed", type=int, default=Options.seed, help="of the prompts' words")
    parser.add_argument("--local", type=int, default=Options.local, help="Ray nodes of the cluster")
    parser.add_argument("--quick", action="store_true", help="ten seconds of the trace")
    parser.add_argument("--json", type=Path, dest="json_path", help="write the rows there as well")
    given = parser.parse_args(argv)
    seconds = 10.0 if given.quick else given.seconds
    options = Options(given.trace, seconds, given.divisor, given.seed, given.local, given.json_path)
    console = Console(stderr=True)
    try:
        if options.json_path is not None and not options.json_path.absolute().parent.is_dir():
            raise ConfigError(f"--json {options.json_path}: there is no such folder", param="json")
        with ended_by_sigterm():
            measured = run(options, lambda text: console.print(text, style="dim", highlight=False))
    except (BenchError, ForetokenError) as error:
        console.print(f"Error: {error}", style="red", highlight=False)
        return 1
    print_table(measured)
    if options.json_path is not None:
        write_json(measured, options.json_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
