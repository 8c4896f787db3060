"""`foretoken bench serve`: every promised row is there, measured or with the reason why not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from loadtests import runs, serve
from loadtests.peers.llama_cpp import LlamaCpp
from loadtests.processes import BenchError, LineProcess, Server
from loadtests.report import Row
from loadtests.runs import Bench, Options, ratio_rows
from loadtests.serve import INVARIANT
from loadtests.serve_transformers import TransformersCases
from tests.support import openai_server
from tests.support.openai_server import OpenAIServer, Reply, running

PROMISED = {
    ("burst32/transformers_batch", "throughput_ratio"),
    ("poisson32/transformers_sequential", "throughput_ratio"),
    ("poisson32/transformers_continuous", "throughput_ratio"),
    ("single/transformers", "tpot_ratio"),
    ("single/transformers", "prefill_ratio"),
    ("single/llama_cpp", "throughput_ratio"),
    ("burst32/llama_cpp", "throughput_ratio"),
    ("mixed32/static_batching", "throughput_ratio"),
    ("mixed32/static_batching", "ideal_ratio"),
    ("burst32", "step_overhead_s"),
    ("start", "first_token_s"),
    *((case, "invariant_price") for case in INVARIANT),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    words = {
        f"Ġ{a}{b}": 10 + 26 * i + j for i, a in enumerate("abcd") for j, b in enumerate("abcdefghijklmnopqrstuvwxyz")
    }
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def by_name(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.case, row.metric): row for row in rows}


@pytest.mark.usefixtures("no_transformers")
def test_a_server_of_the_users_is_measured_and_the_rest_says_why_not(model: Path) -> None:
    with running() as server:
        rows = by_name(serve.run(Options(quick=True, base_url=server.url, model=str(model)), lambda text: None))
    assert set(rows) >= PROMISED
    overhead = rows["burst32", "step_overhead_s"]
    assert overhead.value == pytest.approx(20e-6)
    assert overhead.baseline == pytest.approx(3e-3)
    assert "transformers is not installed" in rows["single/transformers", "tpot_ratio"].reason
    assert "--llama-server" in rows["single/llama_cpp", "throughput_ratio"].reason
    for case in ("mixed32/static_batching", "start", *INVARIANT):
        assert all("--base-url" in row.reason for (name, _), row in rows.items() if name == case)


class ScriptedEngine:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        return {"prefill_s": self.seconds, "decode_s": self.seconds}


@pytest.mark.usefixtures("no_transformers")
def test_with_servers_of_its_own_and_llama_cpp_all_else_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def own_server(model: str | None, prompt_ids: list[int], *flags: str, **settings: Any) -> Iterator[Server]:
        started.append(flags)
        with running() as server:
            yield Server(server.url, "fake", 1.5)

    @contextlib.contextmanager
    def engine(bench: Bench, numerics: str, kernels: str | None) -> Iterator[ScriptedEngine]:
        yield ScriptedEngine(3.0 if numerics == "invariant" else 2.0)

    monkeypatch.setattr(runs, "own_server", own_server)
    monkeypatch.setattr(serve, "_engine", engine)
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {openai_server.__file__} $*\n")
    program.chmod(0o755)
    gguf = tmp_path / "weights.gguf"
    gguf.touch()
    rows = by_name(serve.run(Options(quick=True, model=str(model), llama=LlamaCpp(program, gguf)), lambda text: None))
    assert set(rows) >= PROMISED
    unmeasured = {case for (case, _), row in rows.items() if row.value is None}
    assert unmeasured == {case for case, _ in PROMISED if "transformers" in case}
    assert rows["start", "first_token_s"].value == 1.5
    assert "weights.gguf" in rows["single/llama_cpp", "throughput_ratio"].note
    assert rows["single/llama_cpp", "output_throughput"].baseline is not None
    ideal = rows["mixed32/static_batching", "ideal_ratio"].value
    assert ideal is not None
    assert ideal > 1.2
    assert f"{ideal:.3f}" in rows["mixed32/static_batching", "throughput_ratio"].note
    for case in INVARIANT:
        assert rows[case, "invariant_price"].value == 1.5
    assert started == [(), ("--max-num-seqs", "4"), ("--max-num-seqs", "4", "--static-batching")]


class ScriptedPeer:
    """Answers as the peer's process does; twice as slow as the clock says, so to speak."""

    def __init__(self, answers: dict[str, dict[str, Any]]) -> None:
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    def ask(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        self.asked.append(message)
        answer = self.answers[message["op"]]
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer


TRIAL = {
    "batch": {"attention": "eager", "experts": "grouped_mm"},
    "single": {"attention": "sdpa", "experts": "eager"},
    "prefill": {"attention": "sdpa", "experts": None},
}


def transformers_rows(model: Path, server: OpenAIServer, peer: ScriptedPeer) -> dict[tuple[str, str], Row]:
    with LineProcess("loadtests.generator", "--lines") as generator:
        bench = Bench(Options(quick=True, model=str(model)), generator, lambda text: None)
        beside = TransformersCases(bench, Server(server.url, "fake"))
        beside.start(peer)  # type: ignore[arg-type]
        return by_name([row for case in beside.cases() for row in case.rows()])


def test_beside_transformers_both_get_the_same_work(model: Path) -> None:
    peer = ScriptedPeer(
        {
            "load": {"version": "5.0", "parameters": 1},
            "trial": TRIAL,
            "batch": {"duration_s": 1e-6, "output_tokens": 1},
            "sequential": {"error": "out of memory"},
            "single": {"ttft_s": 1e-6, "tpot_s": 1e-6},
        }
    )
    with running() as server:
        rows = transformers_rows(model, server, peer)
    batch = rows["burst32/transformers_batch", "throughput_ratio"]
    measured = rows["burst32/transformers_batch", "output_throughput"]
    assert measured.baseline == pytest.approx(1e6)
    assert batch.value is not None
    assert measured.ratio == pytest.approx(batch.value)  # equal baselines: the median of ratios is that of medians
    assert "attention eager, experts grouped_mm" in batch.note
    assert rows["single/transformers", "tpot_ratio"].note.endswith("attention sdpa, experts eager")
    assert rows["single/transformers", "prefill_ratio"].note.endswith("attention sdpa")
    assert rows["poisson32/transformers_sequential", "throughput_ratio"].reason == "out of memory"
    assert "continuous" in rows["poisson32/transformers_continuous", "throughput_ratio"].reason

    asked = [message for message in peer.asked if message["op"] == "batch"]
    assert len(asked) == 3
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    for number, message in enumerate(asked):
        assert {tuple(prompt) for prompt in message["prompts"]} == set(prompts[32 * number : 32 * number + 32])
    assert len(set(prompts)) == len(prompts)  # no run finds another's prompts in the prefix cache
    assert {body["max_tokens"] for body in server.bodies[:96]} == {asked[0]["num_tokens"]}
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)
    poisson = next(message for message in peer.asked if message["op"] == "sequential")
    assert poisson["times_s"][0] == 0.0
    assert len(poisson["times_s"]) == len(poisson["prompts"]) == 32


def test_a_short_answer_is_no_measurement(model: Path) -> None:
    peer = ScriptedPeer({"load": {"version": "5.0", "parameters": 1}, "trial": TRIAL, "single": {"error": "gone"}})
    with running(OpenAIServer(lambda body: Reply(num_tokens=1))) as server:
        rows = transformers_rows(model, server, peer)
    assert "shorter than asked for" in rows["burst32/transformers_batch", "throughput_ratio"].reason


def test_a_ratio_is_the_median_of_pairs() -> None:
    pairs = [(10.0, 5.0), (30.0, 10.0), (8.0, 8.0)]
    shown, measured = ratio_rows("c", "throughput_ratio", "output_throughput", "tokens/s", pairs, "note")
    assert (shown.value, shown.baseline, shown.ratio) == (2.0, 1.0, 2.0)
    assert (measured.value, measured.baseline, measured.ratio) == (10.0, 8.0, 1.25)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--llama-server", "x"], "--gguf"),
        (["--llama-server", "/nowhere", "--gguf", "/nowhere"], "/nowhere is not a file"),
        (["--model", "/nowhere"], r"config\.json"),
        (["--base-url", "localhost:8000"], "http://"),
        (["--json", "/nowhere/rows.json"], "no such folder"),
    ],
)
def test_options_that_cannot_be(argv: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        serve.parse(argv)


def test_a_base_url_may_end_as_clients_write_it() -> None:
    assert serve.parse(["--base-url", "http://host:1/v1/"]).base_url == "http://host:1"


@pytest.mark.usefixtures("no_transformers")
def test_the_command_prints_one_table_and_writes_one_array(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    with running() as server:
        code = serve.main(["--quick", "--base-url", server.url, "--model", str(model), "--json", str(file)])
    assert code == 0
    rows = json.loads(file.read_text())
    assert {(row["case"], row["metric"]) for row in rows} >= PROMISED
    assert {row["bench"] for row in rows} == {"serve"}
    assert all(row["reason"] for row in rows if row["value"] is None)
    shown = capsys.readouterr()
    assert "step_overhead_s" in shown.out
    assert "burst32" in shown.out


def test_a_server_that_is_not_there_is_one_line_and_exit_code_1(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--base-url", "http://127.0.0.1:1", "--model", str(model)]) == 1
    assert capsys.readouterr().err.startswith("Error: GET http://127.0.0.1:1/v1/models failed")
