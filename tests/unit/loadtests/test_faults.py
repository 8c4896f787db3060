"""Whom a fault strikes, and how it is known that it struck and is over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from cluster.control.model import DEMO_PATH
from loadtests.cluster_process import LocalCluster
from loadtests.faults import KINDS, Kind, Look, Stroke, working
from tests.support.openai_server import DEADLINE_S
from tests.support.processes import wait_for_end

BEFORE = Look(
    at_s=10.0,
    epoch=3,
    children={"controller": 1, "gateway": 2, "redis": 3, "ray-0": 4, "ray-1": 5, "ray-2": 6},
    workers={"attention-0": 11, "attention-1": 12, "expert-0": 13},
    num_resumed=5,
)
METRICS = """
# TYPE foretoken:worker_num_requests_running gauge
foretoken:worker_num_requests_running{model_name="m",worker="attention-0"} 0.0
foretoken:worker_num_requests_running{model_name="m",worker="attention-1"} 2.0
foretoken:worker_num_requests_waiting{model_name="m",worker="attention-0"} 0.0
foretoken:worker_num_requests_waiting{model_name="m",worker="attention-2"} 1.0
foretoken:worker_engine_steps_total{model_name="m",worker="attention-0"} 9.0
"""


def _kind(name: str) -> Kind:
    (found,) = [kind for kind in KINDS if kind.name == name]
    return found


def _look(**changes: Any) -> Look:
    return replace(BEFORE, at_s=20.0, **changes)


def _stroke(name: str, is_delivered: bool = True) -> Stroke:
    return Stroke(name, at_s=1.0, wall_s=15.0, is_delivered=is_delivered)


def test_every_part_of_a_cluster_is_killed_and_what_can_hang_is_stopped() -> None:
    assert {kind.name: kind.number for kind in KINDS} == {
        "expert": signal.SIGKILL,
        "attention": signal.SIGKILL,
        "controller": signal.SIGKILL,
        "redis": signal.SIGKILL,
        "controller_expert": signal.SIGKILL,
        "controller_hung_expert": signal.SIGKILL,
        "ray_head": signal.SIGKILL,
        "attention_4k": signal.SIGKILL,
        "expert_replica": signal.SIGKILL,
        "expert_hung": signal.SIGSTOP,
        "attention_hung": signal.SIGSTOP,
        "controller_hung": signal.SIGSTOP,
        "redis_hung": signal.SIGSTOP,
        "gateway_hung": signal.SIGSTOP,
    }
    never_pause = {"controller", "redis", "controller_hung", "redis_hung", "ray_head"}
    assert {kind.name for kind in KINDS if not kind.may_pause} == never_pause
    assert [kind.name for kind in KINDS if kind.breaks_streams] == ["gateway_hung"]
    assert {kind.name: kind.goal_s for kind in KINDS if kind.goal_s} == {"expert_replica": 1.0, "attention_4k": 2.0}


def test_the_longest_request_is_as_long_as_its_note_says() -> None:
    context = json.loads((DEMO_PATH / "config.json").read_text())["max_position_embeddings"]
    assert f"{context} tokens" in _kind("attention_4k").note


def test_an_attention_worker_is_at_work_when_it_has_requests_that_run_or_wait() -> None:
    assert working(METRICS) == {"attention-1", "attention-2"}


def test_who_can_be_struck() -> None:
    assert _kind("attention").names(BEFORE) == ["attention-0", "attention-1"]
    assert _kind("expert").names(BEFORE) == ["expert-0"]
    assert _kind("ray_head").names(BEFORE) == ["ray-0"]
    assert _kind("redis").names(replace(BEFORE, children={"controller": 1})) == []


def test_nobody_is_chosen_where_nobody_is() -> None:
    empty = replace(BEFORE, workers={})
    assert _kind("expert").choose(cast(LocalCluster, None), empty, random.Random(0)) is None


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait(DEADLINE_S)


@pytest.mark.needs("linux")
def test_a_stroke_is_a_real_signal(sleeper: subprocess.Popen[bytes]) -> None:
    before = replace(BEFORE, workers={"expert-0": sleeper.pid})
    assert _kind("expert_hung").strike(before, "expert-0").is_delivered
    _, status = os.waitpid(sleeper.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert _kind("expert").strike(before, "expert-0").is_delivered
    assert sleeper.wait(DEADLINE_S) == -signal.SIGKILL
    gone = _kind("expert").strike(before, "expert-0")
    assert not gone.is_delivered
    assert "had ended before the signal" in _kind("expert").missed(before, before, gone)


def test_a_controller_is_killed_with_what_it_started() -> None:
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with subprocess.Popen(["python3", "-S", "-c", script], start_new_session=True, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        bridge = int(parent.stdout.readline())
        _kind("controller").strike(replace(BEFORE, children={"controller": parent.pid}), "controller")
        assert parent.wait(DEADLINE_S) == -signal.SIGKILL
    wait_for_end(bridge, DEADLINE_S)


@pytest.mark.needs("linux")
def test_two_are_struck_at_the_same_moment(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        before = replace(BEFORE, children={"controller": other.pid}, workers={"expert-0": sleeper.pid})
        assert _kind("controller_expert").strike(before, "expert-0").is_delivered
        assert other.wait(DEADLINE_S) == sleeper.wait(DEADLINE_S) == -signal.SIGKILL
        assert not _kind("controller_expert").strike(before, "expert-0").is_delivered


@pytest.mark.needs("linux")
def test_one_hangs_while_the_other_dies(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        before = replace(BEFORE, children={"controller": sleeper.pid}, workers={"expert-0": other.pid})
        assert _kind("controller_hung_expert").strike(before, "expert-0").is_delivered
        assert other.wait(DEADLINE_S) == -signal.SIGKILL
        _, status = os.waitpid(sleeper.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


@pytest.mark.parametrize(
    ("kind", "name", "after", "said"),
    [
        ("attention", "attention-1", _look(num_resumed=6), ""),
        ("attention", "attention-1", _look(), "no request had to leave attention-1"),
        ("attention_hung", "attention-1", _look(), "no request had to leave attention-1"),
        ("ray_head", "ray-0", _look(children={**BEFORE.children, "ray-1": 50, "ray-2": 60}), ""),
        ("ray_head", "ray-0", _look(children={**BEFORE.children, "ray-1": 50}), "ray-2 outlived the head's absence"),
        ("redis", "redis", _look(), ""),
    ],
)
def test_a_kill_that_struck_nothing_is_known(kind: str, name: str, after: Look, said: str) -> None:
    assert _kind(kind).missed(BEFORE, after, _stroke(name)) == said


@pytest.mark.parametrize(
    ("kind", "name", "now", "said"),
    [
        ("expert", "expert-0", None, "no fresh status"),
        ("expert", "expert-0", replace(BEFORE, workers={"expert-0": 99}), "no fresh status"),
        ("expert", "expert-0", _look(), "expert-0 has not been started again"),
        ("expert", "expert-0", _look(workers={}), "expert-0 has not been started again"),
        ("expert", "expert-0", _look(workers={"expert-0": 99}), ""),
        ("controller_hung", "controller", _look(epoch=4), "controller has not been started again"),
        ("controller_hung", "controller", _look(children={"controller": 99}), "no other controller leads"),
        ("controller_hung", "controller", _look(children={"controller": 99}, epoch=4), ""),
        ("redis", "redis", _look(children={"redis": 99}), ""),
        (
            "controller_expert",
            "expert-0",
            _look(epoch=4, workers={"expert-0": 9}),
            "controller has not been started again",
        ),
        (
            "controller_expert",
            "expert-0",
            _look(epoch=4, children={"controller": 9}),
            "expert-0 has not been started again",
        ),
        (
            "controller_expert",
            "expert-0",
            _look(children={"controller": 9}, workers={"expert-0": 9}),
            "no other controller leads",
        ),
        ("controller_expert", "expert-0", _look(epoch=4, children={"controller": 9}, workers={"expert-0": 9}), ""),
        (
            "controller_hung_expert",
            "expert-0",
            _look(epoch=4, workers={"expert-0": 9}),
            "controller has not been started again",
        ),
    ],
)
def test_a_fault_is_over_when_who_was_struck_is_there_again(kind: str, name: str, now: Look | None, said: str) -> None:
    assert _kind(kind).problem(BEFORE, now, _stroke(name)) == said
