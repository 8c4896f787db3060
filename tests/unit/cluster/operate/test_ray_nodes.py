from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.control.topology import local_topology
from cluster.machine import this_machine
from cluster.operate.ray_nodes import ADDRESS_FILE, STARTED, is_started, node_children, node_environment, node_names
from tests.support.eventually import wait_until

TOKEN = "0123456789abcdef"


def _environment(**inherited: str) -> dict[str, str]:
    return node_environment(inherited, token=TOKEN, folder=Path("/ft"), mark={"MARK": "m"})


def test_nodes_share_the_machine_and_only_the_first_is_the_head(tmp_path: Path) -> None:
    machine = replace(this_machine(), available_bytes=9_000, num_cores=4, cpu_quota=None)
    nodes = node_children(3, port=7000, folder=tmp_path, logs=tmp_path, environment=_environment(), machine=machine)
    commands = [" ".join(node.command) for node in nodes]
    assert [" --head" in command for command in commands] == [True, False, False]
    assert all("--memory=3000" in command and "--num-cpus=4" in command for command in commands)
    assert "--port=7000" in commands[0]
    assert all("--address=127.0.0.1:7000" in command for command in commands[1:])
    for name, command in zip(node_names(3), commands, strict=True):
        assert f"--node-name={name}" in command
        assert TOKEN not in command
    assert len({option for node in nodes for option in node.command if option.startswith("--temp-dir=")}) == 3


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_nodes_are_called_as_in_the_topology_of_this_machine(num_nodes: int) -> None:
    assert node_names(num_nodes) == [node.id for node in local_topology(num_nodes).nodes]


def test_a_node_has_its_token_and_nothing_of_ours_or_of_another_ray() -> None:
    environment = _environment(
        FORETOKEN_TOKEN="ours",
        HF_TOKEN="the hub's",
        RAY_ADDRESS="other:1",
        RAY_AUTH_TOKEN="other",
        RAY_health_check_period_ms="5",
        HOME="/h",
    )
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", TOKEN)
    assert (environment["HOME"], environment["MARK"]) == ("/h", "m")
    assert environment["RAY_health_check_period_ms"] == "5"  # how Ray is tuned stays
    assert not {"FORETOKEN_TOKEN", "HF_TOKEN", "RAY_ADDRESS"} & set(environment)


def test_a_node_is_started_again_once_its_head_runs(tmp_path: Path) -> None:
    head, node = node_children(
        2, port=1, folder=tmp_path, logs=tmp_path, environment=_environment(), machine=this_machine()
    )
    assert (head.may_start(), node.may_start()) == (True, False)
    said = tmp_path / "said"
    head.command = ("sh", "-c", f"echo '{STARTED}.'; touch {said}; exec sleep 60")
    head.start()
    try:
        wait_until(said.exists)
        assert node.may_start()
    finally:
        head.end_session()
    assert not node.may_start(), "what a head said that is gone"


def test_a_head_is_started_whatever_it_left(tmp_path: Path) -> None:
    (head,) = node_children(
        1, port=1, folder=tmp_path, logs=tmp_path, environment=_environment(), machine=this_machine()
    )
    (option,) = [option for option in head.command if option.startswith("--temp-dir=")]
    left = Path(option.removeprefix("--temp-dir=")) / ADDRESS_FILE
    left.parent.mkdir()
    left.touch()
    head.before_start()
    assert not left.exists()
    head.before_start()  # the first time there is none


def test_a_node_that_was_not_started_is_not_there(tmp_path: Path) -> None:
    (node,) = node_children(
        1, port=1, folder=tmp_path, logs=tmp_path, environment=_environment(), machine=this_machine()
    )
    assert not is_started(node)
