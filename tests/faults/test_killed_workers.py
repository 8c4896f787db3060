"""A worker of each role is killed in mid-stream: real processes, real signals, every token compared."""

from __future__ import annotations

import pytest

from loadtests.faults import KINDS
from loadtests.kill import Options, Tally, run

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(900)]


def test_no_token_is_lost_repeated_or_different_when_workers_are_killed() -> None:
    kinds = ("expert", "attention")
    tallies = {kind.name: Tally() for kind in KINDS}
    said: list[str] = []
    run(Options(seed=7, kills=len(kinds), quick=True, only=kinds), tallies, said.append)
    told = "\n".join(said)
    total = Tally()
    for name in kinds:
        assert tallies[name].kills + tallies[name].num_missed == 1, told
        total.sum_up(tallies[name])
    assert total.kills, told  # where a stream ends just before its worker, nothing was struck: not of both
    assert total.difference.checked > 0, told
    assert (total.difference.lost, total.difference.repeated, total.difference.differing) == (0, 0, 0), told
    assert total.difference.is_none, told
    assert (total.failed, total.cut, total.pages_leaked) == (0, 0, 0), told
