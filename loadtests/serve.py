"""`foretoken bench serve`: the same requests through Foretoken and through its baselines, in turns, on this machine.

Each ratio is the median over pairs of runs (ours, theirs, ours, theirs …); while one runs, the other has nothing to do.
Both get the same prompts, new ones for each pair, and generate to a fixed length, greedily.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.config import load as load_settings
from cluster.control.launch import worker_environment
from cluster.control.worker_folders import kernels_dir
from cluster.errors import ConfigError, ForetokenError
from cluster.machine import this_machine
from cluster.protocol import Launch
from loadtests.peers.llama_cpp import BODY as LLAMA_BODY
from loadtests.peers.llama_cpp import LlamaCpp, llama_server
from loadtests.processes import BenchError, LineProcess, Server, counters, served_model, started_together
from loadtests.report import Row, print_table, write_json
from loadtests.running import ended_by_sigterm, progress
from loadtests.runs import (
    BENCH,
    NUM_REQUESTS,
    RUN_S,
    START_S,
    Bench,
    Case,
    Load,
    Options,
    ratio,
    ratio_rows,
    throughput_rows,
)
from loadtests.serve_transformers import TransformersCases
from loadtests.workload import Listed, continuous_steps, mixed_lengths, static_steps

OVERHEAD = "burst32", "step_overhead_s", "s"
FIRST_TOKEN = "start", "first_token_s", "s"
FORMS = ("kernels", "torch")  # as served; and as without a compiler
KINDS = ("decode32/fast", "decode1/fast", "prefill/fast")
INVARIANT = tuple(f"{form}_{kind}" for form in FORMS for kind in KINDS)
MIXED = "mixed32/static_batching"
MIXED_SLOTS = 4  # sequences at once in `mixed32`: few, so that a step costs much the same however many are taken
OPENER_TOKENS = 32
OPENER_S = 0.01  # between the opener and the others,
SEND_GAP_S = 0.0005  # and from one of those to the next: the order of arrival makes the batches


def run(options: Options, say: Callable[[str], None]) -> list[Row]:
    """Every row, measured or with the reason why not. Raises `BenchError` where our own server does not serve."""
    with LineProcess("loadtests.generator", "--lines") as generator:
        bench = Bench(options, generator, say)
        if options.base_url is not None:
            server = Server(options.base_url, served_model(options.base_url))
            reason = "needs servers of its own: leave --base-url out"
            return [
                *_beside_peers(bench, server),
                *(row for case in _own_cases(bench, []) for row in case.without(reason)),
            ]
        say("starting the server")
        first_tokens = [_start_and_end(bench) for _ in range(bench.scale.starts - 1)]
        with bench.server() as server:
            first_tokens.append(_typed_to_token_s(server))
            rows = _beside_peers(bench, server)
        return rows + [row for case in _own_cases(bench, first_tokens) for row in case.rows()]


def _start_and_end(bench: Bench) -> float:
    with bench.server() as server:
        return _typed_to_token_s(server)


def _typed_to_token_s(server: Server) -> float:
    assert server.first_token_s is not None, "a server of our own tells"
    return server.first_token_s


def _beside_peers(bench: Bench, server: Server) -> list[Row]:
    bench.send(server, bench.uniform(NUM_REQUESTS, bench.scale.burst))  # warm
    rows = _step_overhead(bench, server).rows()
    rows += _transformers(bench, server)
    return rows + [row for case in _llama_cases(bench, server) for row in case.rows()]


def _transformers(bench: Bench, server: Server) -> list[Row]:
    beside = TransformersCases(bench, server)
    if importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed: pip install 'foretoken[test]'"
        return [row for case in beside.cases() for row in case.without(reason)]
    with LineProcess("loadtests.peers.transformers") as peer:
        try:
            beside.start(peer)
        except BenchError as error:
            return [row for case in beside.cases() for row in case.without(str(error))]
        return [row for case in beside.cases() for row in case.rows()]


# ------------------------------------------------------------------------------------------------------- llama.cpp


def _llama_cases(bench: Bench, server: Server) -> list[Case]:
    shapes = {"single/llama_cpp": (1, bench.scale.single), "burst32/llama_cpp": (NUM_REQUESTS, bench.scale.burst)}
    return [Case((ratio(case),), partial(_llama, bench, server, case, *shape)) for case, shape in shapes.items()]


def _llama(bench: Bench, server: Server, case: str, num: int, shape: tuple[int, int]) -> list[Row]:
    peer = bench.options.llama
    if peer is None:
        raise BenchError("no llama-server named: --llama-server PATH --gguf FILE, a GGUF of the same weights")
    bench.say(f"{case}: starting llama-server")
    with llama_server(
        peer,
        bench.words[:8],
        num_slots=num,
        context_each=sum(shape) + 1,
        num_threads=bench.num_threads,
        deadline_s=START_S,
    ) as other:
        bench.send(other, bench.uniform(num, shape), LLAMA_BODY)  # warm

        def pair() -> tuple[float, float]:
            load = bench.uniform(num, shape)
            return bench.throughput(server, load), bench.throughput(other, load, LLAMA_BODY)

        pairs = bench.pairs(case, bench.scale.pairs, pair)
    note = f"llama-server, {peer.gguf.name}, {bench.num_threads} threads, {num} at once"
    return throughput_rows(case, pairs, note)


# ------------------------------------------------------------------------------------------- our engine by itself


def _own_cases(bench: Bench, first_tokens: list[float]) -> list[Case]:
    return [
        Case((FIRST_TOKEN,), lambda: _first_token(first_tokens)),
        Case(tuple(ratio(case, "invariant_price") for case in INVARIANT), lambda: _invariant_price(bench)),
        Case((ratio(MIXED), ratio(MIXED, "ideal_ratio")), lambda: _mixed(bench)),
    ]


def _first_token(seconds: list[float]) -> list[Row]:
    case, metric, unit = FIRST_TOKEN
    note = f"from typing the command to a token over HTTP, median of {len(seconds)}"
    value = statistics.median(seconds)
    return [Row(bench=BENCH, case=case, metric=metric, unit=unit, value=value, note=note, goal="<= 10")]


def _step_overhead(bench: Bench, server: Server) -> Case:
    case, metric, unit = OVERHEAD

    def measure() -> list[Row]:
        overheads, forwards = [], []
        for _ in range(bench.scale.pairs):
            before = _step_counters(server)
            bench.send(server, bench.uniform(NUM_REQUESTS, bench.scale.burst))
            step_s, forward_s, num = (now - then for now, then in zip(_step_counters(server), before, strict=True))
            if num <= 0:
                raise BenchError("the engine's counters did not move: is this a Foretoken server?")
            overheads.append((step_s - forward_s) / num)
            forwards.append(forward_s / num)
        value, baseline = statistics.median(overheads), statistics.median(forwards)
        note = "a step outside the model, for each sequence in it; baseline: inside the model"
        return [
            Row(
                bench=BENCH,
                case=case,
                metric=metric,
                unit=unit,
                value=value,
                baseline=baseline,
                note=note,
                goal="<= 0.000025",
            )
        ]

    return Case((OVERHEAD,), measure)


def _step_counters(server: Server) -> tuple[float, float, float]:
    """Seconds in steps, seconds in the model, sequences of all steps."""
    found = counters(server.base_url)
    try:
        return (
            found["foretoken:engine_step_seconds_total"],
            found["foretoken:engine_forward_seconds_total"],
            found["foretoken:engine_sequence_steps_total"],
        )
    except KeyError as error:
        raise BenchError(f"{server.base_url}/metrics has no {error.args[0]}") from None


def _invariant_price(bench: Bench) -> list[Row]:
    """Time in the invariant numerics class over time in the fast one, of the engine by itself."""
    batch, alone, prompt = KINDS
    scale = bench.scale

    def times(engine: LineProcess, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        return engine.ask({"prompts": prompts, "num_tokens": num_tokens}, RUN_S)

    def measure(num: int, prompt_tokens: int, num_tokens: int, kind: str) -> tuple[float, float]:
        prompts = bench.prompts([prompt_tokens] * num)
        ours, theirs = (times(engine, prompts, num_tokens)[kind] for engine in (invariant, fast))
        return ours, theirs

    rows = []
    for form in FORMS:
        bench.say(f"invariant_price, {form}: starting two engines")
        kernels = str(kernels_dir(load_settings())) if form == "kernels" else None
        engines = _engine(bench, "invariant", kernels), _engine(bench, "fast", kernels)
        with started_together(*engines) as (invariant, fast):
            works = {
                batch: lambda: measure(NUM_REQUESTS, *scale.burst, "decode_s"),
                alone: lambda: measure(1, *scale.single, "decode_s"),
                prompt: lambda: measure(1, scale.prefill, 1, "prefill_s"),
            }
            for kind, work in works.items():
                case = f"{form}_{kind}"
                work()  # warm
                pairs = bench.pairs(f"{case} invariant_price", scale.pairs, work)
                note = "the same batch through an engine with numerics fast"
                rows += ratio_rows(case, "invariant_price", "duration_s", "s", pairs, note)
    return rows


@contextlib.contextmanager
def _engine(bench: Bench, numerics: Literal["invariant", "fast"], kernels: str | None) -> Iterator[LineProcess]:
    """An engine of this numerics class in a process of its own, with a worker's environment."""
    launch = Launch(
        address="",
        model_path=str(bench.options.model_path),
        served_name="bench",
        numerics=numerics,
        num_threads=bench.num_threads,
        kernels_dir=kernels,
    )
    env = worker_environment(launch, this_machine(), os.environ)
    with LineProcess("workers.bench", env=env) as engine:
        engine.ask(launch, START_S)
        yield engine


def _mixed(bench: Bench) -> list[Row]:
    """Continuous against static batching, both in our engine, `MIXED_SLOTS` sequences at once."""
    lengths = mixed_lengths(NUM_REQUESTS, *bench.scale.mixed_outputs, seed=1)
    # Whoever comes first to an idle engine is a static batch of one. So a request runs already when the others come.
    opened = [OPENER_TOKENS, *lengths]
    ideal = (OPENER_TOKENS + static_steps(lengths, MIXED_SLOTS)) / continuous_steps(opened, MIXED_SLOTS)
    arrivals = Listed([0.0, *(OPENER_S + SEND_GAP_S * index for index in range(NUM_REQUESTS))])

    def load() -> Load:
        prompts = mixed_lengths(len(opened), *bench.scale.mixed_prompts, seed=2)
        return Load(bench.prompts(prompts), opened, arrivals)

    bench.say(f"{MIXED}: starting two servers")
    slots = ("--max-num-seqs", str(MIXED_SLOTS))
    servers = bench.server(*slots), bench.server(*slots, "--static-batching")
    with started_together(*servers) as (continuous, static):
        for server in (continuous, static):
            bench.send(server, load())  # warm

        def pair() -> tuple[float, float]:
            both = load()
            return bench.throughput(continuous, both), bench.throughput(static, both)

        pairs = bench.pairs(MIXED, bench.scale.slow_pairs, pair)
    note = f"our engine waiting for whole batches of {MIXED_SLOTS}; ideal_ratio {ideal:.3f}"
    allowed = "what the lengths allow: steps of static over steps of continuous batching"
    return [
        *throughput_rows(MIXED, pairs, note, f">= {0.9 * ideal:.2f}"),
        Row(bench=BENCH, case=MIXED, metric="ideal_ratio", unit="ratio", value=ideal, baseline=1.0, note=allowed),
    ]


# ----------------------------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> Options:
    """Raises `ConfigError` for options that do not go together; exits as argparse does for unknown ones."""
    parser = argparse.ArgumentParser(
        prog="foretoken bench serve",
        description="Serve the same requests with Foretoken and with its baselines: one table, ratios first.",
    )
    parser.add_argument("--quick", action="store_true", help="every row with less work, within a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as one JSON array as well")
    parser.add_argument("--model", metavar="PATH", help="a local model folder (default: the demo model)")
    parser.add_argument("--base-url", metavar="URL", help="measure this server, which serves --model, and start none")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server, as a baseline")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights as --model, for llama-server")
    given = parser.parse_args(argv)
    if (given.llama_server is None) != (given.gguf is None):
        raise ConfigError("--llama-server and --gguf go together: name both, or neither", param="llama_server")
    for flag, file in (("--llama-server", given.llama_server), ("--gguf", given.gguf)):
        if file is not None and not file.is_file():
            raise ConfigError(f"{flag} {file} is not a file", param=flag)
    if given.model is not None and not (Path(given.model) / "config.json").is_file():
        raise ConfigError(f"--model {given.model} is not a folder with a config.json", param="model")
    if given.base_url is not None and not given.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url {given.base_url} must begin with http:// or https://", param="base_url")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {given.json}: there is no such folder", param="json")
    llama = None if given.gguf is None else LlamaCpp(given.llama_server.absolute(), given.gguf.absolute())
    base_url = None if given.base_url is None else given.base_url.rstrip("/").removesuffix("/v1")
    return Options(quick=given.quick, json_path=given.json, base_url=base_url, model=given.model, llama=llama)


def main(argv: list[str] | None = None) -> int:
    """Run the bench, print its table, write its JSON; 0 when it ran, whatever it found."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        with ended_by_sigterm(), progress() as say:
            rows = run(options, say)
    except (BenchError, ForetokenError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print_table(rows)
    if options.json_path is not None:
        write_json(rows, options.json_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
