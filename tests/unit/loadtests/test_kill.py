"""What `loadtests/kill.py` reports: every kind and all of them, token by token, and no failure hidden."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.environment import PACKAGES
from loadtests import kill
from loadtests.cluster_process import LocalCluster
from loadtests.faults import KINDS, Kind, Look
from loadtests.kill import QUICK, TRIES, TURNS, Options, Tally, kill_once, main, rows
from loadtests.kill_round import Round
from loadtests.processes import BenchError
from loadtests.report import as_json
from loadtests.token_streams import Difference

COUNTS = ("kills", "tokens_checked", "tokens_lost", "tokens_repeated", "tokens_differing", "requests_failed")
PAUSES = ("pause_p50_s", "pause_p99_s")
BESIDE = ("logprobs_differing", "texts_differing", "pages_leaked", "whole_p50_s", "whole_p99_s")
GOOD = Round(Difference(50), pause_s=0.3, undisturbed_s=0.1, whole_s=4.0)
MISSED = Round(Difference(50), missed="no request had to leave attention-0")


def _tally(*rounds: Round) -> Tally:
    tally = Tally()
    for done in rounds:
        tally.add(done)
    return tally


def _tallies() -> dict[str, Tally]:
    bad = Round(Difference(50, lost=1, texts=1), failed=1, pages_leaked=2, pause_s=0.1, undisturbed_s=0.1, whole_s=2.0)
    return {"expert": _tally(GOOD, bad), "redis": Tally(reason="no process of this kind runs here")}


def test_every_kind_and_all_have_every_figure() -> None:
    found = {(row.case, row.metric): row for row in rows(_tallies())}
    metrics = (*COUNTS, *PAUSES, *BESIDE)
    assert set(found) == {(case, metric) for case in ("expert", "redis", "all") for metric in metrics}
    assert [found["all", metric].value for metric in COUNTS] == [2, 100, 1, 0, 0, 1]
    assert found["all", "pages_leaked"].value == 2
    assert found["expert", "pause_p50_s"].value == pytest.approx(0.2)
    assert found["expert", "pause_p50_s"].baseline == pytest.approx(0.1)
    assert found["expert", "whole_p50_s"].value == pytest.approx(3.0)
    assert {row.num_samples for (case, metric), row in found.items() if case != "redis" and "_p" in metric} == {2}


def test_a_kind_with_a_goal_has_it_beside_its_pause_and_says_what_it_is() -> None:
    found = {row.metric: row for row in rows({"attention_4k": _tally(GOOD)}) if row.case == "attention_4k"}
    assert {metric: row.goal for metric, row in found.items() if row.goal} == {"pause_p99_s": "<= 2"}
    assert found["kills"].note == next(kind.note for kind in KINDS if kind.name == "attention_4k")
    missed = _tally(GOOD)
    missed.num_missed, missed.reason = 1, "it was over"
    (row,) = [row for row in rows({"attention_4k": missed}) if (row.case, row.metric) == ("attention_4k", "kills")]
    assert row.note.startswith(found["kills"].note)
    assert row.note.endswith("; 1 more struck nothing: it was over")


def test_a_kind_that_cannot_be_done_says_so_beside_its_zero() -> None:
    (row,) = [as_json(row) for row in rows(_tallies()) if (row.case, row.metric) == ("redis", "kills")]
    assert (row["value"], row["reason"]) == (0.0, "no process of this kind runs here")
    others = [row for row in rows(_tallies()) if row.case == "redis" and row.metric != "kills"]
    assert {(row.value, row.reason) for row in others} == {(None, "no process of this kind runs here")}


def test_what_a_kill_that_struck_nothing_lost_is_not_hidden() -> None:
    tally = _tally(Round(Difference(50, lost=2), missed="it was over"))
    tally.num_missed, tally.reason = 1, "it was over"
    found = {row.metric: row for row in rows({"attention": tally}) if row.case == "attention"}
    assert (found["kills"].value, found["kills"].reason) == (0.0, "it was over")
    assert found["tokens_lost"].value == 2
    assert found["pause_p99_s"].value is None


@pytest.mark.parametrize(
    ("done", "fault"),
    [
        (Round(Difference(50, lost=1)), "1 lost"),
        (Round(Difference(50, repeated=1)), "1 repeated"),
        (Round(Difference(50, differing=1)), "1 differing"),
        (Round(Difference(50, logprobs=1)), "1 logprobs differing"),
        (Round(Difference(50, texts=1)), "1 texts differing"),
        (Round(Difference(50), failed=1), "1 requests failed"),
        (Round(Difference(50), pages_leaked=3), "3 KV pages leaked"),
    ],
)
def test_each_fault_is_one(done: Round, fault: str) -> None:
    (said,) = _tally(GOOD, done).faults
    assert fault in said
    assert _tally(GOOD).faults == []


def test_a_stream_that_ended_with_its_gateway_is_counted_with_a_note_and_is_no_fault() -> None:
    tally = _tally(Round(Difference(50), cut=3), Round(Difference(50), cut=1, failed=1))
    assert tally.faults == ["1 requests failed"]
    for case in ("gateway_hung", "all"):
        (row,) = [row for row in rows({"gateway_hung": tally}) if (row.case, row.metric) == (case, "requests_failed")]
        assert (row.value, row.note.partition(" ")[0]) == (5.0, "4")
    assert _tally(Round(Difference(50), cut=3)).faults == []


# -------------------------------------------------------------------------------------------- kills that strike nothing


def _kill_once(monkeypatch: pytest.MonkeyPatch, *rounds: Round) -> tuple[Tally, list[str]]:
    """One kill whose tries go like that."""
    left: Iterator[Round] = iter(rounds)

    async def one_round(*_: Any) -> Round:
        return next(left)

    monkeypatch.setattr(kill, "one_round", one_round)
    said: list[str] = []
    tally = Tally()
    kill_once(Options(0, 1), cast(LocalCluster, None), KINDS[0], cast(Any, None), tally, said.append)
    assert next(left, None) is None, "it was not tried again"
    return tally, said


def test_a_kill_that_struck_nothing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    tally, said = _kill_once(monkeypatch, MISSED, GOOD)
    assert (tally.kills, tally.num_missed, tally.difference.checked) == (1, 0, 100)
    assert tally.faults == []
    assert "it struck nothing: no request had to leave attention-0" in said[0]


def test_a_kill_that_never_strikes_is_not_done_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tally, _ = _kill_once(monkeypatch, *[MISSED] * TRIES)
    assert (tally.kills, tally.num_missed) == (0, 1)
    assert tally.faults == ["1 kills struck nothing: no request had to leave attention-0"]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("bad", "code"), [({}, 0), ({"lost": 1}, 1)])
def test_the_exit_code_tells(bad: dict[str, int], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(options: Options, tallies: dict[str, Tally], say: Any) -> None:
        for tally in tallies.values():
            tally.reason = "none was drawn"
        tallies["expert"] = _tally(Round(Difference(50, **bad), pause_s=0.1, undisturbed_s=0.1, whole_s=1.0))

    monkeypatch.setattr(kill, "run", run)
    path = tmp_path / "kill.json"
    assert main(["--json", str(path)]) == code
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "kills", "is_told"),
    [
        ([], TURNS * len(KINDS), False),
        (["--quick"], len(QUICK), False),
        (["--quick", "--kills", "2"], 2, False),
        (["--quick", "--kills", "9"], 9, True),
        (["--only", "redis", "--only", "expert"], 2 * TURNS, False),
        (["--only", "ray_head", "--quick"], 1, False),
    ],
)
def test_as_many_kills_are_done_as_were_asked_for(
    arguments: list[str],
    kills: int,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Options] = []

    def run(options: Options, tallies: dict[str, Tally], say: Any) -> None:
        seen.append(options)
        for tally in tallies.values():
            tally.reason = "none was drawn"

    monkeypatch.setattr(kill, "run", run)
    assert main(arguments) == 0
    assert seen[0].kills == kills
    kinds = seen[0].only or (QUICK if seen[0].quick else [kind.name for kind in KINDS])
    assert {kind.name for kind in seen[0].kinds} == set(kinds)
    assert ("take longer than the minute" in capsys.readouterr().err) == is_told


def test_what_was_measured_before_a_run_broke_off_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(_options: Options, tallies: dict[str, Tally], _say: object) -> None:
        tallies["expert"].add(GOOD)
        raise BenchError("the cluster was not whole in time")

    monkeypatch.setattr(kill, "run", run)
    path = tmp_path / "kill.json"
    assert main(["--json", str(path)]) == 1
    found = {(row["case"], row["metric"]): row for row in json.loads(path.read_text())}
    assert found["expert", "kills"]["value"] == 1
    assert found["redis", "kills"]["reason"] == "the run ended before"


def test_it_runs_as_a_file(tmp_path: Path) -> None:
    command = [sys.executable, str(PACKAGES / "loadtests" / "kill.py"), "--kills", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--kills must be at least 1, not 0" in done.stderr


# ------------------------------------------------------------------------------------------------------------ the run


def _run(options: Options, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, Tally]]:
    """What happens in turn: clusters by their copies, kills by their kind."""
    done: list[str] = []

    @contextlib.contextmanager
    def whole_cluster(*, expert_copies: int, **_: Any) -> Iterator[LocalCluster]:
        done.append(f"cluster {expert_copies}")
        yield cast(LocalCluster, None)

    def kill_once(_options: Options, _cluster: LocalCluster, kind: Kind, _rng: Any, tally: Tally, _say: Any) -> None:
        done.append(kind.name)
        tally.add(GOOD)

    here = Look(
        0.0, 1, dict.fromkeys(("controller", "redis", "gateway", "ray-0"), 1), {"attention-0": 2, "expert-0": 3}, 0
    )
    monkeypatch.setattr(kill, "whole_cluster", whole_cluster)
    monkeypatch.setattr(kill, "kill_once", kill_once)
    monkeypatch.setattr(kill, "look", lambda _: here)
    tallies = {kind.name: Tally() for kind in KINDS}
    kill.run(options, tallies, lambda _: None)
    return done, tallies


def test_each_kind_is_killed_in_a_cluster_of_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    done, tallies = _run(Options(7, 2 * len(KINDS)), monkeypatch)
    second = done.index("cluster 2")
    assert (done[0], done.count("cluster 1"), done.count("cluster 2")) == ("cluster 1", 1, 1)
    assert done[second + 1 :] == ["expert_replica"] * 2
    assert {name: tally.kills for name, tally in tallies.items()} == {kind.name: 2 for kind in KINDS}


def test_no_cluster_is_started_that_nobody_is_killed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(Options(7, 1, only=("expert_replica",)), monkeypatch)[0] == ["cluster 2", "expert_replica"]
    done, tallies = _run(Options(7, 1, only=("redis", "expert")), monkeypatch)
    assert (done[0], len(done)) == ("cluster 1", 2)
    assert tallies["expert_replica"].reason == "left out by --only"
    (other,) = {"redis", "expert"} - set(done)
    assert tallies[other].reason == "1 kills in all: none of this kind was drawn"
