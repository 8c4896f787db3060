from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.config import load
from cluster.control.launch import launch_message, worker_environment
from cluster.environment import PACKAGES
from cluster.machine import Machine
from cluster.protocol import Launch

MACHINE = Machine("Linux", "x86_64", "A processor", frozenset({"avx2", "avx512f"}), 8, None, 2**34, 2**33)


def test_the_launch_message_carries_the_settings() -> None:
    settings = load({"device": "cpu", "kv_cache_bytes": "1GiB", "log_format": "json", "max_model_len": 512})
    launch = launch_message(
        settings, address="unix:/s", model_path=Path("/m"), served_name="n", progress=True, machine=MACHINE
    )
    assert msgspec.json.decode(msgspec.json.encode(launch), type=Launch) == launch
    assert launch.host_memory_bytes == MACHINE.available_bytes
    assert (launch.device, launch.kv_cache_bytes, launch.log_format, launch.max_model_len) == (
        "cpu",
        2**30,
        "json",
        512,
    )
    assert (launch.address, launch.model_path, launch.served_name, launch.progress) == ("unix:/s", "/m", "n", True)
    assert launch.exit_with_parent


LAUNCH = Launch(address="unix:/s", model_path="/m", served_name="n")


@pytest.mark.parametrize(
    ("numerics", "device", "architecture", "flags", "expected"),
    [
        ("auto", "auto", "x86_64", {"avx2", "avx512f"}, "AVX512,STRICT"),
        ("auto", "cpu", "x86_64", {"avx2"}, "AVX2,STRICT"),
        ("invariant", "cuda", "x86_64", {"avx2"}, "AVX2,STRICT"),
        ("auto", "cuda:1", "x86_64", {"avx2"}, None),
        ("fast", "cpu", "x86_64", {"avx2"}, None),
        ("invariant", "cpu", "x86_64", {"sse4_2"}, None),
        ("invariant", "cpu", "aarch64", {"asimd"}, None),
    ],
)
def test_mkl_is_held_to_one_order_where_results_must_not_depend_on_the_batch(
    numerics: str, device: str, architecture: str, flags: set[str], expected: str | None
) -> None:
    launch = Launch(address="unix:/s", model_path="/m", served_name="n", numerics=numerics, device=device)  # type: ignore[arg-type]
    machine = replace(MACHINE, architecture=architecture, cpu_flags=frozenset(flags))
    assert worker_environment(launch, machine, {}).get("MKL_CBWR") == expected


def test_threads_follow_the_setting_then_the_containers_quota() -> None:
    assert "OMP_NUM_THREADS" not in worker_environment(LAUNCH, MACHINE, {})
    assert worker_environment(LAUNCH, replace(MACHINE, cpu_quota=2.0), {})["OMP_NUM_THREADS"] == "2"
    wanted = Launch(address="unix:/s", model_path="/m", served_name="n", num_threads=3)
    assert worker_environment(wanted, replace(MACHINE, cpu_quota=2.0), {})["MKL_NUM_THREADS"] == "3"


def test_the_worker_is_found_beside_cluster_whatever_the_current_folder_holds() -> None:
    environment = worker_environment(LAUNCH, MACHINE, {"PYTHONPATH": "/elsewhere", "HOME": "/h"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(PACKAGES), "/elsewhere"]
    assert environment["HOME"] == "/h"
    assert (PACKAGES / "workers").is_dir()


def test_a_worker_inherits_no_secret_and_nobodys_settings() -> None:
    inherited = {"FORETOKEN_STORE": "redis://h", "RAY_AUTH_TOKEN": "r", "HF_TOKEN": "h", "PATH": "/b"}
    assert set(worker_environment(LAUNCH, MACHINE, inherited)) - {"MKL_CBWR"} == {"PATH", "PYTHONPATH"}


def test_the_token_of_a_launch_is_not_shown() -> None:
    assert "hidden" not in repr(msgspec.structs.replace(LAUNCH, token="hidden"))
    assert "token=None" in repr(LAUNCH)
